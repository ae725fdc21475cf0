"""Which sequences lose no assignment to device capacity (DeepSeek-V2, section 2.2.4)."""

import hashlib


def is_exempt(sample_id: int, seed: int, share: float) -> bool:
    """Decide by a hash: the same for a sample at any layout and after any restart.

    Args:
        sample_id: counts all samples of a run from 0.
        seed: the run's; another seed exempts others.
        share: of all samples, 0 to 1; 0.1 in the paper.
    """
    digest = hashlib.blake2b(f"exempt/{seed}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
