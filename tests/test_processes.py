"""An NLA in other processes: pickled before and after its first call, copied, forked."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_lens import NLA, NLAError
from nla_lens.engines.served.server import Server
from nla_lens.errors import NLARemoteError
from nla_lens.halves.options import Options
from nla_lens.models import limited
from nla_lens.models.passes import OwnPass, has_hooks
from nla_lens.results.explanations import Explanations
from nla_lens.stream.frameworks import Probe

from .checkpoints import EXPLANATIONS, vectors

ENGINES = {
    "transformers": None,
    "transformer_lens": "transformer_lens.model_bridge",
    "nnsight": "nnsight",
}
"""And what each needs."""
PATIENCE = 120.0


def answers(nla: NLA) -> list[Any]:
    explained = nla.explain(vectors()[:2], max_new_tokens=5)
    return [explained.to_dict(), nla.reconstruct(list(EXPLANATIONS[:2])).tolist()]


@pytest.fixture(scope="module")
def load(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[[str], NLA]:
    def load(engine: str) -> NLA:
        if needed := ENGINES[engine]:
            pytest.importorskip(needed)
        av, ar = pair_dirs("llama", "replace")
        return NLA.from_pretrained(av=av, ar=ar, engine=engine)

    return cache(load)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pickle_answers_as_the_original(engine: str, load: Callable[[str], NLA]) -> None:
    nla = copy.deepcopy(load(engine))
    fresh = pickle.loads(pickle.dumps(nla))
    wanted = answers(nla)
    used = pickle.loads(pickle.dumps(nla))
    assert answers(fresh) == answers(used) == answers(pickle.loads(pickle.dumps(used))) == wanted


@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_answers_as_the_original(engine: str, load: Callable[[str], NLA]) -> None:
    nla = load(engine)
    wanted = answers(nla)
    copied = copy.deepcopy(nla)
    assert answers(copied) == wanted
    assert copied.verbalizer.engine is not nla.verbalizer.engine


def test_a_copy_has_weights_of_its_own(load: Callable[[str], NLA]) -> None:
    nla = load("transformers")
    wanted = answers(nla)
    copied = copy.deepcopy(nla)
    with torch.no_grad():
        for weight in copied.verbalizer.engine.model.parameters():
            weight.zero_()
    copied.verbalizer.engine.forget_prefix()
    assert answers(nla) == wanted
    assert answers(copied) != wanted


def test_a_pickle_is_no_larger_after_use(load: Callable[[str], NLA]) -> None:
    nla = pickle.loads(pickle.dumps(load("transformers")))
    fresh = len(pickle.dumps(nla))
    answers(nla)
    assert len(pickle.dumps(nla)) < 1.05 * fresh, "what was kept of prefixes stays behind"


@pytest.mark.parametrize("engine", ["transformers", "nnsight"])
def test_hidden_states_were_asked_for(engine: str, load: Callable[[str], NLA]) -> None:
    """transformers then hooks the model with what has no pickle."""
    nla = copy.deepcopy(load(engine))
    model, ids = torch_model(nla), torch.tensor([nla.verbalizer.prompt_ids])

    def states(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(model(ids, output_hidden_states=True).hidden_states)

    wanted = states(model)
    kept = pickle.loads(pickle.dumps(nla))
    for asked in (torch_model(kept), model, torch_model(copy.deepcopy(nla))):
        found = states(asked)
        assert len(found) == len(wanted)
        assert all(map(torch.equal, found, wanted))
    assert answers(kept) == answers(nla)
    assert not has_hooks(model)


def torch_model(nla: NLA) -> Any:
    model = nla.verbalizer.engine.model
    return getattr(model, "_module", model)


def test_another_process(load: Callable[[str], NLA]) -> None:
    """A fresh interpreter, as `multiprocessing` starts it on most systems, and Ray on all."""
    nla = load("transformers")
    wanted = answers(nla)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(answers, (nla,)).get(PATIENCE) == wanted


class Texts(torch.utils.data.Dataset):
    """Explains in the workers of a DataLoader."""

    def __init__(self, nla: NLA) -> None:
        self.nla = nla

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> str:
        return self.nla.explain(vectors()[index], max_new_tokens=5).text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_another_thread_is_in_a_pass(load: Callable[[str], NLA]) -> None:
    nla = load("transformers")
    wanted = [Texts(nla)[i] for i in range(2)]
    inside, over = threading.Event(), threading.Event()

    def stay() -> None:
        with OwnPass(nla.verbalizer.engine.model):
            inside.set()
            over.wait(PATIENCE)

    threads = torch.get_num_threads()
    # More of OpenMP's do not live through a fork.
    torch.set_num_threads(1)
    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    try:
        assert inside.wait(PATIENCE)
        loader = torch.utils.data.DataLoader(
            Texts(nla), num_workers=1, multiprocessing_context="fork", timeout=PATIENCE
        )
        assert [text for (text,) in loader] == wanted
    finally:
        over.set()
        thread.join(PATIENCE)
        torch.set_num_threads(threads)


def test_a_copy_in_the_middle_of_a_pass(load: Callable[[str], NLA]) -> None:
    """By another thread; it must not hold what only that pass needs."""
    nla = load("transformers")
    model = nla.verbalizer.engine.model
    ids = torch.tensor([nla.verbalizer.prompt_ids])
    with torch.no_grad():
        wanted = model(ids).logits
    with OwnPass(model) as own_pass:
        own_pass.hook(model.model.layers[1], lambda module, args, output: 2 * output[0])
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for copied in copies:
            assert torch.equal(copied(ids).logits, wanted)


def test_results_and_settings(load: Callable[[str], NLA]) -> None:
    nla = load("transformers")
    explained = nla.explain(
        vectors()[:4].reshape(2, 2, -1),
        max_new_tokens=4,
        temperature=1.0,
        num_samples=2,
        seed=1,
    )
    kept = pickle.loads(pickle.dumps(explained))
    assert isinstance(kept, Explanations)
    assert kept == explained
    assert kept[1, 0].samples == explained[1, 0].samples
    for thing in (nla.spec, explained[0, 0], Options(seed=3)):
        assert pickle.loads(pickle.dumps(thing)) == thing
        assert copy.deepcopy(thing) == thing


def test_errors_keep_what_they_hold(load: Callable[[str], NLA]) -> None:
    done = Explanations([load("transformers").explain(vectors()[0], max_new_tokens=2)])
    for error in (NLAError("what and where"), NLARemoteError("the server is busy", cause="busy")):
        error.explanations, error.later = done, {3: done[0]}
        kept = pickle.loads(pickle.dumps(error))
        assert type(kept) is type(error)
        assert str(kept) == str(error)
        assert (kept.explanations, kept.later) == (done, {3: done[0]})
        assert getattr(kept, "cause", None) == getattr(error, "cause", None)


def test_a_server_keeps_its_key_and_shows_it_nowhere() -> None:
    server = pickle.loads(pickle.dumps(Server("http://localhost:8000", api_key="open-sesame")))
    assert server.api_key == "open-sesame"
    assert "sesame" not in repr(server)


def test_a_probe_stays_here(load: Callable[[str], NLA]) -> None:
    probe = Probe(object(), load("transformers"), lambda: None)
    for away in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(NLAError, match="attach it where it is used"):
            away(probe)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("is_asking", [False, True])
def test_a_fork_asks_a_process_of_its_own_about_templates(is_asking: bool) -> None:
    """Two that read the answers of one would get one another's."""
    assert limited.render("{{ 1 + 1 }}", {}) == "2"
    parents = limited._child._process
    assert parents is not None
    with limited._child._lock if is_asking else contextlib.nullcontext():
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            status = 1
            with contextlib.suppress(BaseException):
                asked = [limited.render(f"{{{{ {i} }}}}", {}) for i in range(20)]
                another = limited._child._process
                assert asked == [str(i) for i in range(20)]
                assert another is not None and another.pid != parents.pid
                limited._child._end()
                status = 0
            os._exit(status)
    if not is_asking:
        asked = [limited.render(f"{{{{ {-i} }}}}", {}) for i in range(1, 20)]
        assert asked == [str(-i) for i in range(1, 20)]
    assert os.waitpid(child, 0)[1] == 0
    assert limited.render("x", {}) == "x" and limited._child._process is parents
