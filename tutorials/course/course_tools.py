"""What every notebook of the course uses: `check` runs a visible test, `boot` loads the model."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

# Before transformers is imported, which brings a warning that widgets of Jupyter are missing.
warnings.filterwarnings("ignore")

from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
logging.set_verbosity_error()


def check(title: str) -> Callable[[Callable[[], None]], None]:
    """Runs the test below it at once and says what came of it; the notebook goes on either way.

    >>> @check("1.1")
    ... def _():
    ...     assert answer == 42, f"expected 42, found {answer}"
    """

    def run(test: Callable[[], None]) -> None:
        try:
            test()
        except NotImplementedError as todo:
            print(f"{title}: to do. {todo}")
        except AssertionError as wrong:
            print(f"{title}: not yet. {wrong}")
        # Of what a student writes anything may be raised; a traceback would end "Run all" here.
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{title}: not yet. {type(error).__name__}: {error}, at `{at.line}`")
            if "NoneType" in str(error):
                print("Does your function return its result?")
        else:
            print(f"{title}: passed")

    return run


def boot(source: str) -> Any:
    """A source model in TransformerLens: a TransformerBridge, or with 2.x a HookedTransformer.

    Args:
        source: `nla.spec.source_model`, a directory or a name on the hub.

    Returns:
        The model, its weights as they are: nothing folded, nothing centred.
    """
    if find_spec("transformer_lens.model_bridge") is not None:
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(source)
    return _hooked(source)


def _hooked(source: str) -> Any:
    """HookedTransformer.from_pretrained takes names of a fixed list, and no directory."""
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config
    from transformer_lens.pretrained import weight_conversions
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    family = loaded.config.model_type
    cfg = get_pretrained_model_config(source, device="cpu")
    model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(source))
    convert = getattr(weight_conversions, f"convert_{family}_weights")
    model.load_and_process_state_dict(
        convert(loaded, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
