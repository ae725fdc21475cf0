"""Builds everything a run needs, in the order of the journey."""

from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from dsv2_train.checkpoint.disk.retention import Retention
from dsv2_train.checkpoint.disk.state import GuardState, TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.checkpoint.ranks import RankGroup
from dsv2_train.checkpoint.staging import Staging
from dsv2_train.config.run import RunConfig
from dsv2_train.data.loader import Split, open_split
from dsv2_train.data.manifest import verify
from dsv2_train.distributed import groups as process_groups
from dsv2_train.distributed.env import Env
from dsv2_train.model.build import build_model
from dsv2_train.model.gpt import DeepSeekV2Model
from dsv2_train.model.implementation import Choice, choose
from dsv2_train.model.sdpa import measure_sdpa
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.monitor.ranks.watch import RankWatch
from dsv2_train.monitor.report import StartUp, start_up_table
from dsv2_train.optim.adam import choose_adam
from dsv2_train.optim.build import build_optimizer, wrap
from dsv2_train.optim.zero import ZeroOptimizer
from dsv2_train.pipeline.build import build_executor
from dsv2_train.pipeline.profiler import Profiler
from dsv2_train.recipe.clock import Schedule
from dsv2_train.recipe.parameters import model_parameters, stage_parameters
from dsv2_train.runs.ownership import ATTEMPT, Fence
from dsv2_train.train.attempts import said_by_launcher
from dsv2_train.train.resume import begin_or_go_on, clock_of, skip_list_of
from dsv2_train.train.run import Run
from dsv2_train.train.signals import StopSignals
from dsv2_train.train.telemetry.telemetry import Telemetry

# Larger corpus files are held against their size at the start; `dsv2 validate` reads all of them.
READ_AT_START_BYTES = 64 << 30


def build_run(config: RunConfig, env: Env) -> Run:
    """Build, go on from the newest intact checkpoint or begin, and show the start-up table.

    Args:
        config: the run, checked.
        env: this process among all.

    Returns:
        This rank's run, ready to train.

    Raises:
        ConfigError: if an implementation that was asked for cannot run here.
        DataError: if the corpus is not the one its manifest describes.
        CheckpointError: if every checkpoint is damaged, or the newest is of another model.

    Note:
        Collective over all ranks.
    """
    if env.rank == 0:
        verify(Path(config.data.path), max_file_bytes=READ_AT_START_BYTES)
    choices = choose(config.parallel, env.device)
    timeout_s = config.cluster.group_timeout_s
    groups = process_groups.build(config.parallel, timeout_s)
    hosts = process_groups.build_hosts(timeout_s)
    choices["attention"] = RankGroup(hosts).on_rank0(
        lambda: measure_sdpa(choices["attention"], config, env.device)
    )
    models = [
        build_model(config, groups, choices, env.device, chunk)
        for chunk in range(config.parallel.chunks)
    ]
    chunks = [wrap(model, config.parallel, config.recipe.precision, groups) for model in models]
    adam = choose_adam(config.optim.adam, env.device)
    optimizer = build_optimizer(chunks, config.optim, adam, groups)
    fence = Fence(config.run.folder, said_by_launcher(ATTEMPT, hosts))
    checkpoints = _checkpoints(config, optimizer, hosts, fence)
    state = begin_or_go_on(config, checkpoints, optimizer)
    schedule = Schedule(config.recipe, config.optim)
    clock = clock_of(state)
    monitor = _monitor(config, env, schedule.last_step(clock), state)
    if monitor is not None:
        for damage in checkpoints.passed_over:
            monitor.alert("checkpoint", damage)
    ranks = RankWatch(config, monitor, hosts, env.device)
    executor = build_executor(config, chunks, env.device, timeout_s)
    run = Run(
        config=config,
        env=env,
        groups=groups,
        world=groups.intra_dist_opt,
        hosts=hosts,
        schedule=schedule,
        clock=clock,
        guard=state.guard if state else GuardState(),
        chunks=chunks,
        optimizer=optimizer,
        executor=executor,
        train_split=replace(_split(config, "train"), skip_list=skip_list_of(config, state)),
        validation_split=_split(config, "validation"),
        checkpoints=checkpoints,
        monitor=monitor,
        telemetry=_telemetry(config, monitor, models, groups, ranks, env.device),
        profiler=Profiler(config, env, executor, hosts),
        signals=StopSignals(hosts, fence if env.rank == 0 else None),
    )
    if monitor is not None:
        served = [*choices.values(), Choice("adam", adam.implementation, adam.reason)]
        monitor.message(start_up_table(_start_up(run, served)))
    return run


def _checkpoints(
    config: RunConfig, optimizer: ZeroOptimizer, hosts: ProcessGroup, fence: Fence
) -> CheckpointManager:
    staging = Staging(list(optimizer.pieces())) if config.checkpoint.asynchronous else None
    return CheckpointManager(
        config.run.checkpoint_folder,
        config.checkpoint.every_steps,
        hosts,
        staging,
        Retention(config.checkpoint.keep_last, config.checkpoint.keep_every_steps),
        fence.check,
    )


def _monitor(
    config: RunConfig, env: Env, total_steps: int, state: TrainState | None
) -> Monitor | None:
    if env.rank != 0:
        return None
    return Monitor(
        config.monitor,
        config.run.folder,
        total_steps=total_steps,
        first_step=state.step if state else 0,
        wandb_run_id=state.wandb_run_id if state else None,
        resolved_config=config.model_dump(mode="json"),
        device_budget=config.recipe.capacity_factor or 1.0,
    )


def _split(config: RunConfig, name: str) -> Split:
    length = config.recipe.sequence_length
    return open_split(Path(config.data.path), name, length, config.run.seed)


def _telemetry(
    config: RunConfig,
    monitor: Monitor | None,
    models: list[DeepSeekV2Model],
    groups: ProcessGroupCollection,
    ranks: RankWatch,
    device: torch.device,
) -> Telemetry:
    mixtures = {layer: one for model in models for layer, one in model.mixtures().items()}
    return Telemetry(config, monitor, mixtures, groups.intra_dist_opt, ranks, device)


def _start_up(run: Run, choices: list[Choice]) -> StartUp:
    config, device = run.config, run.env.device
    on_gpu = device.type == "cuda"
    whole = model_parameters(config.model)
    stages = stage_parameters(config.model, config.parallel)
    parallel, batch_size = config.parallel, run.schedule.at(run.clock).global_batch_size
    return StartUp(
        run_name=config.run.name,
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        layout={"pp": parallel.pp, "ep": parallel.ep, "dp": parallel.dp, "edp": parallel.edp},
        schedule=parallel.schedule,
        layers_per_chunk=parallel.split(config.model.num_layers),
        num_parameters=whole.total,
        num_activated_parameters=whole.activated(config.model).total,
        parameters_per_rank=tuple(stage.on_rank(parallel).total for stage in stages),
        sequence_length=config.recipe.sequence_length,
        global_batch_size=batch_size,
        micro_batch_size=config.recipe.micro_batch_size,
        num_microbatches=run.num_microbatches(batch_size),
        first_step=run.clock.step,
        total_steps=run.schedule.last_step(run.clock),
        total_tokens=run.schedule.consumed_tokens(run.schedule.end(run.clock)),
        staging_bytes=run.checkpoints.staging_bytes,
        implementations=choices,
    )
