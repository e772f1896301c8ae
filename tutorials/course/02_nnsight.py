# requires: nnsight>=0.8
# %% [markdown]
# # 2 · The same in nnsight
#
# **Claim.** The embedded pair `tiny` reads its source model best at the block it was trained on, K = 2, and writes as fluently about the others.
# Evidence: one token of each of ten documents, every block: at block K `fve_nrm` is 0.99 on average. Control: at the other blocks it is 0.66 at
# most, and at block K, with each text handed on to another document, -0.69.
#
# **You will** save residuals in a trace, in a batch with padding and step by step while the model writes; read a profile over blocks with
# its control; and put one prompt's vector into another prompt's run.
#
# **You need** notebook 1, or to know what `fve_nrm` is. [nnsight](https://nnsight.net) runs a model with your own code inside its forward pass.
#
# | section | minutes |
# |---|---|
# | 1 One trace | 15 |
# | 2 Several prompts at once | 15 |
# | 3 While the model writes | 15 |
# | 4 Block by block | 20 |
# | 5 From one prompt into another | 20 |

# %%
import nnsight
import torch
from course_tools import check
from transformers import AutoTokenizer

import nla_lens

PAIR = "tiny"  # A released pair: "kitft/nla-qwen2.5-7b-L20" (its three models need about 45 GB)

# %%
nla = nla_lens.NLA.from_pretrained(PAIR)
source, K = nla.spec.source_model, nla.spec.layer
tokenizer = AutoTokenizer.from_pretrained(source)
# nnsight 0.8.1 cannot tell the tokenizer from the config alone with the newest transformers.
model = nnsight.TransformersModel(source, task="text-generation", tokenizer=tokenizer)
probe = nla_lens.attach(model, nla)
print(f"{len(model.model.layers)} blocks; the NLA reads {nla.spec.hook_name}")

# %% [markdown]
# `attach` changes the classes of this one model and its blocks, and nothing else: nnsight itself stays as it is, and so do the values.
#
# ## 1 One trace
#
# Layer K is the **output** of block K. (In a multimodal wrapper, such as Gemma 3 as released, the same blocks are at
# `model.model.language_model.layers`.)

# %%
TEXT = "Nora lives in Naples. The fox chased the dog out of the kennel."

with model.trace(TEXT):
    h = model.model.layers[K].output.save()

for position in (4, -1):
    e = h[0, position].explain()
    print(f"{e.position:3} {e.token!r:10} fve_nrm {e.fve_nrm:.2f}  {e.text}")

# %% [markdown]
# ### Exercise 2.1: the last token of each text
#
# > Difficulty 2 of 5 · importance 5 of 5 · 10 minutes
#
# Only what is picked inside the trace has to leave it: with a model on a server that is what travels. Run all texts in **one** trace; nnsight pads a
# batch on the left, so that the last column is each text's last token.


# %% tags=["solution"]
def last_residuals(model, texts, block):
    """The residual stream behind a block, at the last token of each text.

    Args:
        model: An nnsight model.
        texts: A list of n texts.
        block: Which block, from 0.

    Returns:
        [n, d].
    """
    # SOLUTION: trace the list of texts, save the last column of the block's output
    with model.trace(texts):
        last = model.model.layers[block].output[:, -1].save()
    return last
    # END


# %% tags=["wrong"]
def last_residuals(model, texts, block):
    with model.trace(texts):
        last = model.model.layers[block].input[:, -1].save()
    return last


# %% tags=["test"]
@check("2.1")
def _():
    texts = [TEXT, "Nora lives in", "The chef chopped the"]
    found = last_residuals(model, texts, K)
    expected = torch.cat(nla_lens.extract(source, texts, K, positions=[-1]))
    assert tuple(found.shape) == tuple(expected.shape), f"shape {tuple(found.shape)}"
    apart = (found.as_ordinary() - expected.as_ordinary()).abs().max().item()
    assert apart < 1e-3, f"largest difference to nla_lens.extract: {apart:.2f}"
    for e in found.explain().flat:
        print(f"{e.token!r:10} {e.text}")


# %% [markdown] tags=["hint"]
# `with model.trace(texts):` and in it `model.model.layers[block].output[:, -1].save()`.

# %% [markdown]
# ## 2 Several prompts at once
#
# ### Exercise 2.2: whose position is that?
#
# > Difficulty 2 of 5 · importance 4 of 5 · 10 minutes
#
# In a batch that is padded on the left, column 7 is another position in each row. Who forgets it reads padding, or thinks that the first token
# (which decodes poorly in every released pair) is the tenth.


# %% tags=["solution"]
def own_position(column, length, width):
    """Which position of its own text stands in a column of a batch padded on the left.

    Args:
        column: From 0, or negative from the end.
        length: How many tokens this text has.
        width: How many columns the batch has.

    Returns:
        The position, from 0; None where there is padding.
    """
    # SOLUTION: count the columns of padding, subtract them; before them there is no position
    if column < 0:
        column += width
    position = column - (width - length)
    return position if position >= 0 else None
    # END


# %% tags=["wrong"]
def own_position(column, length, width):
    return column if column < length else None


# %% tags=["test"]
@check("2.2")
def _():
    found = [own_position(c, 3, 5) for c in range(5)]
    assert found == [None, None, 0, 1, 2], f"3 tokens in 5 columns: {found}"
    assert own_position(-1, 3, 5) == 2, "the last column is the last position"
    texts = [TEXT, "Nora lives in"]
    with model.trace(texts):
        batch = model.model.layers[K].output.save()
    lengths = [len(tokenizer(text).input_ids) for text in texts]
    width = batch.shape[1]
    for row, length in enumerate(lengths):
        for column in (width - 2, width - 1):
            e = batch[row, column].explain()
            mine = own_position(column, length, width)
            assert mine == e.position, f"row {row}, column {column}: {mine}, not {e.position}"
            print(f"row {row}, column {column} of {width}: position {mine}, {e.token!r}")


# %% [markdown] tags=["hint"]
# How many columns of padding does a text of `length` tokens get in a batch of `width` columns?

# %% [markdown]
# ## 3 While the model writes
#
# ### Exercise 2.3: step by step
#
# > Difficulty 3 of 5 · importance 4 of 5 · 15 minutes
#
# In a generation with a cache each step passes the block once: the first with the whole prompt, every other one with the token that was just
# written. `tracer.iter[:n]` goes through them; a list that is to outlive the trace is made by `nnsight.save([])`.


# %% tags=["solution"]
def while_writing(model, prompt, block, n):
    """The newest token's residual at each of n steps.

    Args:
        model: An nnsight model.
        prompt: A text.
        block: Which block.
        n: How many tokens the model writes, by argmax.

    Returns:
        A list of n tensors [1, d].
    """
    # SOLUTION: generate; in each step of tracer.iter append the last column of the block's output
    with model.generate(prompt, max_new_tokens=n, do_sample=False) as tracer:
        steps = nnsight.save([])
        for _ in tracer.iter[:n]:
            steps.append(model.model.layers[block].output[:, -1])
    return steps
    # END


# %% tags=["wrong"]
def while_writing(model, prompt, block, n):
    with model.generate(prompt, max_new_tokens=n, do_sample=False) as tracer:
        steps = nnsight.save([])
        for _ in tracer.iter[:n]:
            steps.append(model.model.layers[block].output[:, 0])
    return steps


# %% tags=["test"]
@check("2.3")
def _():
    n, prompt = 4, "Nora lives in"
    steps = while_writing(model, prompt, K, n)
    assert len(steps) == n, f"{n} steps, found {len(steps)}"
    explained = [step[0].explain() for step in steps]
    written = "".join(e.token for e in explained[1:])
    (again,) = nla_lens.extract(source, [prompt + written], K, positions=slice(-n, None))
    apart = max(
        (s[0].as_ordinary() - r.as_ordinary()).abs().max().item()
        for s, r in zip(steps, again, strict=True)
    )
    assert apart < 1e-3, f"read in one go, the same text has other residuals: {apart:.2f}"
    for e in explained:
        print(f"{e.position:3} {e.token!r:8} {e.text}")


# %% [markdown] tags=["hint"]
# In the first step the output has as many columns as the prompt has tokens, later one. `[:, -1]` is the newest token in both.

# %% [markdown]
# ## 4 Block by block
#
# An NLA is trained on one block. It writes fluently about every other one.
#
# ### Exercise 2.4: a profile and its control
#
# > Difficulty 3 of 5 · importance 5 of 5 · 15 minutes


# %% tags=["solution"]
def profile(vectors, explain, score):
    """Fidelity block by block, and the same with texts of other documents.

    Args:
        vectors: {block: [n, d]}, one vector of each of n documents.
        explain: `explain(vectors)` -> n texts.
        score: `score(texts, vectors)` -> [n].

    Returns:
        {block: (mean score, mean score with each text handed on by one row)}.
    """
    # SOLUTION: explain each block's vectors; score them, then against vectors.roll(1, 0)
    found = {}
    for block, own in vectors.items():
        texts = explain(own)
        found[block] = score(texts, own).mean().item(), score(texts, own.roll(1, 0)).mean().item()
    return found
    # END


# %% tags=["wrong"]
def profile(vectors, explain, score):
    found = {}
    for block, own in vectors.items():
        mean = score(explain(own), own).mean().item()
        found[block] = mean, mean
    return found


# %% tags=["test"]
sys.path.insert(0, str(TUTORIALS / "tiny_nla"))
import corpus

documents = [d.text for d in corpus.documents(seed=4_000_001, count=12) if d.topic][:10]


@check("2.4")
def _():
    toy = {0: torch.tensor([[1.0], [2.0]]), 1: torch.tensor([[3.0], [5.0]])}
    right = profile(
        toy, lambda v: v[:, 0].tolist(), lambda t, v: -(torch.tensor(t) - v[:, 0]).abs()
    )
    assert right == {0: (0, -1), 1: (0, -2)}, f"own 0, handed on -1 and -2: {right}"
    blocks = range(len(model.model.layers))
    vectors = {
        b: torch.cat(
            [r.as_ordinary() for r in nla_lens.extract(source, documents, b, positions=[-4])]
        )
        for b in blocks
    }
    found = profile(
        vectors,
        lambda v: [e.text for e in nla.explain(v, progress=False)],
        lambda texts, v: nla.score(texts, v).fve_nrm,
    )
    for block, (own, other) in found.items():
        mark = "<- the one it was trained on" if block == K else ""
        print(f"block {block}: own {own:5.2f}, handed on {other:5.2f} {mark}")
    if PAIR == "tiny":
        elsewhere = max(own for block, (own, _) in found.items() if block != K)
        assert found[K][0] > 0.95 and elsewhere < 0.9 and found[K][1] < 0, found


# %% [markdown] tags=["hint"]
# One vector of each document: so handing each text on by one row already gives it to another document.

# %% [markdown]
# That is why such explanations are flagged `other_layer`: nothing in the *text* tells.
#
# ## 5 From one prompt into another
#
# ### Exercise 2.5: a patch, and how far it carries
#
# > Difficulty 4 of 5 · importance 4 of 5 · 20 minutes
#
# Does the model *use* what stands at block K? Put the last vector of one prompt (the donor) into the run of another, and see whose
# next token comes out. Write the patch, and a metric that is 0 where nothing changed and 1 where the donor's answer comes out.
# The control: patching a prompt with its *own* vector must change nothing.


# %% tags=["solution"]
def patched(model, prompt, block, vector):
    """Probabilities of the next token with another vector behind a block, at the last position.

    Args:
        model: An nnsight model.
        prompt: A text.
        block: Which block.
        vector: [d].

    Returns:
        [vocabulary].
    """
    # SOLUTION: in a trace assign the vector to the last column; save the logits of lm_head there
    with model.trace(prompt):
        model.model.layers[block].output[:, -1] = vector
        logits = model.lm_head.output[0, -1].save()
    return logits.softmax(-1)
    # END


def carried(result, own, donor):
    """How far a result went from the prompt's own answer to the donor's, from 0 to 1.

    Args:
        result: [vocabulary], probabilities.
        own: Of the prompt without a patch.
        donor: Of the donor.
    """
    # SOLUTION: 1 - |result - donor| / |own - donor|, both summed over the vocabulary
    return (1 - (result - donor).abs().sum() / (own - donor).abs().sum()).item()
    # END


# %% tags=["wrong"]
def patched(model, prompt, block, vector):
    with model.trace(prompt):
        model.model.layers[block].output[:] = vector
        logits = model.lm_head.output[0, -1].save()
    return logits.softmax(-1)


def carried(result, own, donor):
    return (result - own).abs().sum().item()


# %% tags=["test"]
def answer(prompt):
    """What the model says next without a patch."""
    with model.trace(prompt):
        logits = model.lm_head.output[0, -1].save()
    return logits.softmax(-1)


@check("2.5")
def _():
    toy = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    ends = carried(toy[0], *toy), carried(toy[1], *toy), carried(toy.mean(0), *toy)
    assert ends == (0, 1, 0.5), f"0 at its own answer, 1 at the donor's, 1/2 between: {ends}"
    prompts = ["The chef chopped the", "The doctor gave the", "Nora lives in"]
    own = {p: answer(p) for p in prompts}
    vectors = torch.cat(nla_lens.extract(source, prompts, K, positions=[-1])).as_ordinary()
    for p, v in zip(prompts, vectors, strict=True):
        same = patched(model, p, K, v)
        apart = (same - own[p]).abs().max().item()
        assert apart < 1e-3, f"patched with its own vector a probability changes by {apart:.3f}"
    for p in prompts:
        for donor, v in zip(prompts, vectors, strict=True):
            if p != donor:
                share = carried(patched(model, p, K, v), own[p], own[donor])
                print(f"{p!r:23} with the vector of {donor!r:23} carried {share:.2f}")
    print("with its own vector nothing changes")


# %% [markdown] tags=["hint"]
# Inside the trace `model.model.layers[block].output[:, -1] = vector` sets it; `model.lm_head.output[0, -1].save()` has the logits.

# %%
probe.detach()
with model.trace(TEXT):
    h = model.model.layers[K].output.save()
type(h).__name__

# %% [markdown]
# ## What to take with you
#
# * Pick inside the trace; save little.
# * In a batch padded on the left, positions count from each text's own first token.
# * An NLA says something about every block. Believe it about one.
#
# With `remote=True` the same traces run on NDIF: notebook 3.
