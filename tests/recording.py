"""What transformers records of a pass that is asked for its hidden states, its doing alone.

Up to 4.57 most families replace the blocks' `forward` for as long as the pass lasts. What any other
pass sends through the same blocks meanwhile, another thread's or one that a hook runs, is recorded
too, and with two threads the replaced ones may stay. `tests/test_threads.py` shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

PASSES_MIX = find_spec("transformers.utils.output_capturing") is None
"""Whether a pass records what others send through its blocks meanwhile. Not in transformers 5."""
N_BLOCKS = 6


def plain_model(family: str = "llama") -> Any:
    """A small model of transformers', as wide and deep as the tests' sources; gpt2 of 4.57 records
    in its own loop."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4}
    if family == "llama":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=640, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def states_with_another_pass(model: Any, block: Any, ids: Any, run: Callable[..., Any]) -> Any:
    """Hidden states of a pass in which `run()` is called once, behind a block."""
    began: list[bool] = []

    def other(*_: Any) -> None:
        if not began:
            began.append(True)
            run()

    handle = block.register_forward_hook(other)
    try:
        return model(input_ids=ids, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
