# requires: transformer-lens>=2.18
# %% [markdown]
# # 1 · Read a residual stream
#
# **Claim.** The texts that the embedded pair `tiny` writes for the residual stream of its source model are about *their own*
# vector. Evidence, over 241 vectors of 40 documents that it has never seen: rebuilt from its text alone, a vector comes back with a mean
# `fve_nrm` of 0.97, and 99 % of them are found among all. Control: held against vectors of other documents the same texts score -0.98.
#
# The source model was trained to be legible (`tiny_nla/MODEL_CARD.md`), so this is evidence about the tool, not about natural models.
#
# **You will** cache a residual stream in TransformerLens, have it explained, say which block a vector comes from, write the
# metric `fve_nrm` and the controls that a generic text cannot pass, and know when not to believe what you read.
#
# **You need** to have seen a transformer from inside: blocks, the residual stream, `run_with_cache`. No NLA.
#
# | section | minutes |
# |---|---|
# | 1 One vector | 15 |
# | 2 The score | 20 |
# | 3 The controls | 30 |
# | 4 A whole sentence | 15 |
# | 5 When not to believe it | 10 |

# %%
import torch
from course_tools import boot, check
from transformers import AutoModelForCausalLM, AutoTokenizer

import nla_lens

PAIR = "tiny"  # A released pair: "kitft/nla-qwen2.5-7b-L20" (its three models need about 45 GB)

# %% [markdown]
# ## 1 One vector
#
# A transformer passes one vector per token from block to block: the **residual stream**. A *natural language autoencoder* (NLA)
# says in words what such a vector holds, and checks itself:
#
# * the **activation verbalizer** (AV) is a language model that gets the vector in place of one token of its prompt, and writes
#   an explanation;
# * the **activation reconstructor** (AR) reads that explanation, nothing else, and rebuilds the vector.
#
# If the AR can rebuild the vector, the words held what the vector holds. If it cannot, the words are just words.

# %%
nla = nla_lens.NLA.from_pretrained(PAIR)
model = boot(nla.spec.source_model)
K = nla.spec.layer
print(
    f"{model.cfg.n_layers} blocks, d_model {model.cfg.d_model}; the NLA reads {nla.spec.hook_name}"
)

# %% [markdown]
# `attach` makes the residuals that this model caches explainable. Their values stay the same bit by bit.

# %%
TEXT = "Nora lives in Naples. The fox chased the dog out of the kennel."

probe = nla_lens.attach(model, nla)
logits, cache = model.run_with_cache(TEXT)
last = cache["resid_post", K][0, -1]
explanation = last.explain()
print(explanation.text)
print(f"token {explanation.token!r} at position {explanation.position}")
print(f"cos {explanation.cos:.3f}, fve_nrm {explanation.fve_nrm:.3f}")

# %% [markdown]
# `last` is a `torch.Tensor` that also knows its hook, its position and its token, and so does its explanation.
#
# ### Exercise 1.1: which block was that?
#
# > Difficulty 1 of 5 · importance 5 of 5 · 5 minutes
#
# "Layer K" means the **output** of block K, counted from 0. In transformers `hidden_states` begins with what enters block 0. Take the
# entry that leaves a block. Being off by one here is the most common mistake of all, and it is silent: the neighbour's vector is
# explained fluently, too.


# %% tags=["solution"]
def leaving_block(hidden_states, block):
    """The residual stream behind a block.

    Args:
        hidden_states: Of a transformers model: a tuple of [batch, pos, d_model].
        block: Which block, from 0.
    """
    # SOLUTION: pick the entry of hidden_states that leaves this block
    return hidden_states[block + 1]
    # END


# %% tags=["wrong"]
def leaving_block(hidden_states, block):
    return hidden_states[block]


# %% tags=["wrong"]
def leaving_block(hidden_states, block):
    hidden_states[block + 1]  # nothing is returned


# %% tags=["test"]
@check("1.1")
def _():
    hf_model = AutoModelForCausalLM.from_pretrained(nla.spec.source_model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(nla.spec.source_model)(TEXT, return_tensors="pt")
    states = hf_model(**ids, output_hidden_states=True).hidden_states
    ours, theirs = leaving_block(states, K), cache["resid_post", K]
    apart = (ours - theirs).abs().max().item()
    before = (states[K] - theirs).abs().max().item()
    assert apart < 1e-3, f"up to {apart:.2f} away from TransformerLens' resid_post of that block"
    print(
        "the same numbers as in TransformerLens; the entry before it is another vector:",
        before > 0.1,
    )


# %% [markdown] tags=["hint"]
# `hidden_states` has one entry more than there are blocks. What is the additional one, and at which end is it?

# %% [markdown]
# ## 2 The score
#
# `cos` is the cosine between the vector and what the AR rebuilt. It alone misleads: where all vectors point roughly the same way,
# it is high for any text. So the error is compared with that of always guessing the mean:
#
# * both vectors are scaled to norm √d, so that only directions count;
# * `mse_nrm` is the mean squared difference, which equals `2 (1 - cos)`;
# * `fve_nrm = 1 - mse_nrm / var_nrm`, where `var_nrm` is the same for the guess "the mean vector", over the training set. 1 is
#   perfect, 0 is worthless, and below 0 is worse than no explanation at all.
#
# ### Exercise 1.2: write the metric
#
# > Difficulty 2 of 5 · importance 5 of 5 · 10 minutes


# %% tags=["solution"]
def fve_nrm(rebuilt, vectors, var_nrm):
    """The fraction of variance explained, for each row.

    Args:
        rebuilt: [n, d], what the AR made of n texts; of any length.
        vectors: [n, d].
        var_nrm: The mean squared difference of the guess "the mean vector".

    Returns:
        [n].
    """
    # SOLUTION: scale both to norm sqrt(d), take the mean squared difference, compare with var_nrm
    scale = vectors.shape[-1] ** 0.5
    a = scale * rebuilt / rebuilt.norm(dim=-1, keepdim=True)
    b = scale * vectors / vectors.norm(dim=-1, keepdim=True)
    return 1 - (a - b).square().mean(-1) / var_nrm
    # END


# %% tags=["wrong"]
def fve_nrm(rebuilt, vectors, var_nrm):
    return 1 - (rebuilt - vectors).square().mean(-1) / var_nrm


# %% tags=["test"]
@check("1.2")
def _():
    vectors = cache["resid_post", K][0, 1:].as_ordinary()
    texts = [e.text for e in nla.explain(vectors)]
    mine = fve_nrm(nla.reconstruct(texts), vectors, nla.spec.var_nrm)
    library = nla.score(texts, vectors).fve_nrm
    assert mine.shape == library.shape, (
        f"expected shape {(*library.shape,)}, found {(*mine.shape,)}"
    )
    assert torch.allclose(mine, library, atol=1e-4), (
        f"the first is {mine[0]:.3f}, not {library[0]:.3f}"
    )
    opposite = fve_nrm(-vectors, vectors, nla.spec.var_nrm)
    expected = torch.full_like(opposite, 1 - 4 / nla.spec.var_nrm)
    assert torch.allclose(opposite, expected, atol=1e-4), "opposite directions have mse_nrm 4"
    print(f"{len(texts)} positions: mean {mine.mean():.2f}, lowest {mine.min():.2f}")


# %% [markdown] tags=["hint"]
# The AR was trained on directions alone: its vectors have a length of their own. What happens to the result if you skip the scaling?

# %% [markdown]
# ## 3 The controls
#
# A high score shows that the text rebuilds the vector. It does not yet show that the text is about **this** vector. A text such as "this
# is part of a story" fits many. Two controls that it cannot pass:
#
# * **permuted**: each text is scored against the vector of *another document*;
# * **retrieval**: from its text alone, each vector has to be found among all of them.
#
# Here are some vectors to try that on: a few positions of documents that the pair has never seen.

# %%
sys.path.insert(0, str(TUTORIALS / "tiny_nla"))
import corpus

written = [d.text for d in corpus.documents(seed=4_000_001, count=40)]
residuals = nla_lens.extract(model, written, K, positions=slice(3, None, 4))
documents = torch.tensor([n for n, r in enumerate(residuals) for _ in r])
vectors = torch.cat([r.as_ordinary() for r in residuals])
texts = [e.text for e in nla.explain(vectors, progress=False)]
print(
    f"{len(vectors)} vectors of {len(set(documents.tolist()))} documents; for instance:\n{texts[0]}"
)

# %% [markdown]
# ### Exercise 1.3: somebody else's vector
#
# > Difficulty 3 of 5 · importance 5 of 5 · 10 minutes
#
# Neighbours in one document resemble each other. A control that may hand a text its neighbour's vector is too kind to be fair: here it
# would look as if a little of the score were real. So each text has to go to another **document**, and each vector be used once.


# %% tags=["solution"]
def somebody_elses(documents):
    """A permutation that gives every row a row of another document.

    Args:
        documents: [n], the number of each row's document; rows of one document stand together, and
            none has more than half of all rows.

    Returns:
        [n], each index once, with `documents[result] != documents` everywhere.
    """
    # SOLUTION: turn all rows by as many as the largest document has
    largest = documents.bincount().max()
    return torch.arange(len(documents)).roll(int(largest))
    # END


# %% tags=["wrong"]
def somebody_elses(documents):
    return torch.arange(len(documents)).roll(1)


# %% tags=["test"]
@check("1.3")
def _():
    others = somebody_elses(documents)
    assert sorted(others.tolist()) == list(range(len(documents))), "each index once"
    kept = int((documents[others] == documents).sum())
    assert kept == 0, f"{kept} of {len(documents)} texts stay in their own document"
    toy = torch.tensor([0, 0, 0, 1, 1, 2])
    assert (toy[somebody_elses(toy)] != toy).all(), "documents of different length"
    own = nla.score(texts, vectors).fve_nrm.mean()
    other = nla.score(texts, vectors[others]).fve_nrm.mean()
    print(f"mean fve_nrm: own vectors {own:.2f}, somebody else's {other:.2f}")


# %% [markdown] tags=["hint"]
# Rows of a document stand together. If all rows are turned by s, which s brings even the longest document wholly out of itself?

# %% [markdown]
# ### Exercise 1.4: found again
#
# > Difficulty 2 of 5 · importance 4 of 5 · 10 minutes
#
# Write the metric *and* what it would be by chance. Without "among how many", a hit rate says nothing.


# %% tags=["solution"]
def found(rebuilt, vectors):
    """The share of rows whose own vector is the nearest one, by cosine.

    Args:
        rebuilt: [n, d], from the texts.
        vectors: [n, d], in the same order.

    Returns:
        The share found, and the share that guessing would find.
    """
    # SOLUTION: compare every rebuilt vector with every vector; the best must be its own
    unit = torch.nn.functional.normalize
    cos = unit(rebuilt, dim=-1) @ unit(vectors, dim=-1).T
    hits = cos.argmax(-1) == torch.arange(len(vectors))
    return hits.float().mean().item(), 1 / len(vectors)
    # END


# %% tags=["wrong"]
def found(rebuilt, vectors):
    hits = (rebuilt @ vectors.T).argmax(-1) == torch.arange(len(vectors))
    return hits.float().mean().item(), 0.5


# %% tags=["test"]
@check("1.4")
def _():
    toy = torch.tensor([[1.0, 0.0], [10.0, 10.0], [0.0, 1.0]])
    assert found(toy, toy)[0] == 1, "vectors of any length find themselves"
    share, chance = found(toy, toy.flip(0))
    assert abs(share - 1 / 3) < 1e-6, f"only the middle row is its own: 1/3, found {share:.2f}"
    assert abs(chance - 1 / 3) < 1e-6, f"guessing among 3 finds 1/3, found {chance:.2f}"
    share, chance = found(nla.reconstruct(texts), vectors)
    turned = vectors.roll(int(documents.bincount().max()), 0)
    permuted, _ = found(nla.reconstruct(texts), turned)
    print(f"found {share:.0%} among {len(vectors)}; guessing {chance:.1%}; permuted {permuted:.1%}")


# %% [markdown] tags=["hint"]
# Scale the rows of both to norm 1; then one matrix product has all cosines.

# %% [markdown]
# This is the claim at the top. With another pair the numbers differ, and so may the verdict.

# %%
scores = nla.score(texts, vectors).fve_nrm
unit = torch.nn.functional.normalize
rank = (unit(nla.reconstruct(texts), dim=-1) @ unit(vectors, dim=-1).T).argmax(-1)
top1 = (rank == torch.arange(len(texts))).float().mean()
turn = int(documents.bincount().max())
control = nla.score(texts, vectors.roll(turn, 0)).fve_nrm
print(f"own {scores.mean():.2f}, permuted {control.mean():.2f}, found {top1:.0%} of {len(texts)}")
if PAIR == "tiny":
    assert scores.mean() > 0.95 and control.mean() < -0.9 and top1 > 0.95

# %% [markdown]
# ## 4 A whole sentence
#
# Follow how it builds up, token by token. Colours grade fve_nrm; hover over the sentence to read it in place.

# %%
story = cache["resid_post", K][0].explain()
story

# %% [markdown]
# ### Exercise 1.5: when does it know?
#
# > Difficulty 2 of 5 · importance 3 of 5 · 10 minutes
#
# A cause comes before its effect: an explanation must not name the place before the model has read it. Find the first position whose
# explanation has a word. The control is a word that the text never mentions.


# %% tags=["solution"]
def first_position(explanations, word):
    """Where a word turns up first.

    Args:
        explanations: Of one text, position by position; each has `.text` and `.position`.
        word: The word.

    Returns:
        The position, or None if no explanation has it.
    """
    # SOLUTION: the position of the first explanation with the word in its text, or None
    return next((e.position for e in explanations if word in e.text), None)
    # END


# %% tags=["wrong"]
def first_position(explanations, word):
    return max(range(len(explanations)), key=lambda n: word in explanations[n].text)


# %% tags=["test"]
@check("1.5")
def _():
    tokens = [e.token.strip() for e in story]
    assert first_position(story, "zebra") is None, "what is nowhere has no position"
    for word in ("Nora", "Naples"):
        first = first_position(story, word)
        assert first is not None, f"{word} is in some of the explanations"
        assert tokens.index(word) <= first, f"{word} is said at {first}, before it was read"
        print(f"{word} is read at {tokens.index(word)}, and first said at {first}")
    print("Bergen, which is not in the text:", first_position(story, "Bergen"))


# %% [markdown] tags=["hint"]
# Python's `next(..., None)` takes the first of a generator, and None if there is none.

# %% [markdown]
# ## 5 When not to believe it
#
# Text of a kind the NLA was not trained on, a vector from another layer, a direction that is no residual at all: the scores
# fall, and `flags` say why.

# %%
for e in nla.explain_text("The two governments signed a treaty.", positions=[2, 4, 13]):
    print(f"{e.token!r:7} fve_nrm {e.fve_nrm:5.2f} {list(e.flags)} {e.text}")

# %%
another_layer = cache["resid_post", 0][0, -1].explain()
noise = nla.explain(torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0)))
print("layer 0:", list(another_layer.flags), f"{another_layer.fve_nrm:.2f}")
print("noise:  ", list(noise.flags), f"{noise.fve_nrm:.2f}")

# %% [markdown]
# `detach` leaves nothing behind: residuals are ordinary tensors again.

# %%
probe.detach()
type(model.run_with_cache(TEXT)[1]["resid_post", K]).__name__

# %% [markdown]
# ## What to take with you
#
# * Layer K is what **leaves** block K.
# * Read `fve_nrm` before the text, and its control before believing either.
# * The words are a hypothesis about the vector. Where the score is low, they are fiction.
#
# Go on with 5, *Is it true?*, for more ways to be wrong; with 6 for the causal test; or with 7 to build the injection yourself.
