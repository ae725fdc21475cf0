import pytest
import torch

from dsv2_kernels.native.workspace import zeros


def test_a_workspace_is_not_used_again_after_an_error(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="launch"), zeros(4, device) as words:
        words.fill_(1)
        raise RuntimeError("launch")
    with zeros(4, device) as words:
        assert not words.any()
        place = words.data_ptr()
    with zeros(3, device) as words:
        assert words.data_ptr() == place
