"""From a teacher's config to what its training steps over: prompts in batches, and an engine that was seen to work."""

import gc
from typing import Any

import torch

from kdecs.errors import ModelError
from kdecs.runtime import Runtime
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.data import TeacherData, prepare_data
from kdecs.teacher.engine import start_engine
from kdecs.teacher.families import Family
from kdecs.teacher.load_checks import check_head, tree_is_exact, tree_probes


def prepare(config: TeacherConfig, family: Family, runtime: Runtime) -> tuple[TeacherData, Any]:
    """Data and engine; with a tree only where this very model takes one exactly. Collective.

    Raises ModelError for a model whose logits are not those of its head, or that does not take the tree that the
    config insists on.
    """
    if config.batches.batching == "pairs" or not family.can_share_prefixes:
        return _start(config, family, runtime, use_tree=False)
    data, engine = _start(config, family, runtime, use_tree=True)
    budget = config.batches.micro_batch_tokens
    probes = tree_probes(data.train.pairs, data.train.prompts, max_tokens=budget)
    if tree_is_exact(engine, engine.module, probes, runtime):
        engine.module.use_tree = True
        return data, engine
    if config.batches.batching == "tree":
        raise ModelError(
            f"model {config.model.base}: a prefix tree does not give the logits of its prompts (a sliding window, "
            "ALiBi or the like); set batches.batching=pairs"
        )
    if runtime.is_main:
        print(f"teacher {config.name}: this model does not take a prefix tree exactly; going on with pairs")
    engine.destroy()
    del data, engine  # before the next one: two networks may not fit
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return _start(config, family, runtime, use_tree=False)


def _start(
    config: TeacherConfig, family: Family, runtime: Runtime, *, use_tree: bool
) -> tuple[TeacherData, Any]:
    data = prepare_data(
        config, family, use_tree=use_tree, world_size=runtime.world_size, show_progress=runtime.is_main
    )
    engine = start_engine(config, family, runtime, data.accumulation_steps)
    engine.eval()
    check_head(engine, engine.module, data.train.prompts[data.train.shortest], config.model.base)
    return data, engine
