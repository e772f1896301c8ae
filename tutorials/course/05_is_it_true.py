# requires: scikit-learn>=1.3
# %% [markdown]
# # 5 · Is it true?
#
# **Claim.** The explanations of the embedded pair `tiny` are about their vectors, and a third of them quote something that is not there.
# Evidence, over 135 vectors of 30 documents: `fve_nrm` 0.97 (0.94 to 0.99 over documents); 76 % of the quotations stand in the text read so
# far; a calibration tells right from wrong with AUROC 0.91 on documents it has not seen. Control: the best constant text has -0.83, texts of
# other documents -0.94; of *their* quotations 11 % stand there; trust handed out at random leaves as many errors as before.
#
# The pair was made to be legible, so this says that the *measures* work, not that natural models can be read this well. The report at
# the end prints published figures of real pairs beside ours.
#
# **You will** write six measures and the control that belongs to each, see which of them a meaningless text can pass, and put a
# probability on an explanation.
#
# **You need** notebook 1: `fve_nrm` and the permuted control. No framework: only vectors and texts.
#
# | section | minutes |
# |---|---|
# | 1 Floors | 15 |
# | 2 How sure is the mean? | 15 |
# | 3 What it quotes | 15 |
# | 4 Sentence by sentence | 15 |
# | 5 True of everybody | 15 |
# | 6 A probability | 20 |

# %%
import re

import torch
from course_tools import check

import nla_lens

PAIR = "tiny"  # A released pair: "kitft/nla-qwen2.5-7b-L20" (its three models need about 45 GB)

# %% [markdown]
# An explanation is a claim about a vector, and language models are good at claims. `fve_nrm` is **fidelity**: how much the reconstructor
# can do with the words. Truth is another matter, and no single number has it. Here are explanations with all that is known of each: the
# vector, the document, and the text that had been read up to there.

# %%
nla = nla_lens.NLA.from_pretrained(PAIR)
sys.path.insert(0, str(TUTORIALS / "tiny_nla"))
import corpus

written = [d.text for d in corpus.documents(seed=4_000_001, count=30)]
residuals = nla_lens.extract(
    nla.spec.source_model, written, nla.spec.layer, positions=slice(4, None, 5)
)
documents = torch.tensor([n for n, r in enumerate(residuals) for _ in r])
vectors = torch.cat([r.as_ordinary() for r in residuals])
explained = [e for r in residuals for e in nla.explain(r, progress=False).flat]
texts = [e.text for e in explained]

tokenizer = nla.open_source().tokenizer
contexts = [
    tokenizer.decode(tokenizer(written[n]).input_ids[: e.position + 1], skip_special_tokens=True)
    for n, e in zip(documents.tolist(), explained, strict=True)
]
others = torch.arange(len(texts)).roll(int(documents.bincount().max()))
assert (documents[others] != documents).all()
print(f"{len(texts)} explanations of {len(written)} documents. After {contexts[2]!r}:\n{texts[2]}")

# %% [markdown]
# ## 1 Floors
#
# ### Exercise 5.1: one text for all
#
# > Difficulty 2 of 5 · importance 5 of 5 · 10 minutes
#
# How much of the score can be had *without looking at the vector*? Take each explanation in turn and give it to **all** vectors; the best of
# these constant texts is the floor. A verbalizer that has learned nothing but the average can reach it.


# %% tags=["solution"]
def constant_floor(rebuilt, vectors, fve):
    """The best mean score that one text for all vectors gets.

    Args:
        rebuilt: [m, d], what the reconstructor made of m candidate texts.
        vectors: [n, d].
        fve: `fve(rebuilt, vectors)` -> [n], row by row.

    Returns:
        A float.
    """
    # SOLUTION: for each candidate repeat it for all vectors, average, and take the best
    means = [fve(row.expand_as(vectors), vectors).mean().item() for row in rebuilt]
    return max(means)
    # END


# %% tags=["wrong"]
def constant_floor(rebuilt, vectors, fve):
    return fve(rebuilt, vectors).mean().item()


# %% tags=["test"]
def fve(rebuilt, vectors):
    """fve_nrm of each row, as in notebook 1."""
    unit = torch.nn.functional.normalize
    cos = (unit(rebuilt, dim=-1) * unit(vectors, dim=-1)).sum(-1)
    return 1 - 2 * (1 - cos) / nla.spec.var_nrm


@check("5.1")
def _():
    toy = torch.eye(3)
    found = constant_floor(toy, toy, lambda a, b: (a * b).sum(-1))
    assert abs(found - 1 / 3) < 1e-6, f"each row fits one of three: 1/3, found {found:.2f}"
    rebuilt = nla.reconstruct(texts)
    own, floor = fve(rebuilt, vectors).mean().item(), constant_floor(rebuilt, vectors, fve)
    permuted = fve(rebuilt[others], vectors).mean().item()
    print(f"own texts {own:.2f}; best constant text {floor:.2f}; permuted {permuted:.2f}")


# %% [markdown] tags=["hint"]
# `row.expand_as(vectors)` repeats one vector for all rows without copying it.

# %% [markdown]
# The floor is below 0, where the guess "the mean vector" would be: a text stands for *some* vector, and being confidently wrong is worse than
# the mean. Permuted texts, confident about something else, are worst.
#
# ## 2 How sure is the mean?
#
# ### Exercise 5.2: a bootstrap over documents
#
# > Difficulty 3 of 5 · importance 4 of 5 · 15 minutes
#
# Thirty positions of one document are not thirty independent cases. Draw *documents* with replacement, each with all its rows, and look
# where the mean goes. Drawing rows gives an interval that is too narrow, and a paper that is too sure.


# %% tags=["solution"]
def interval(values, documents, draws=1000, seed=0):
    """Where 95 % of the means lie when documents are drawn anew.

    Args:
        values: [n].
        documents: [n], the number of each row's document, from 0 and with none left out.
        draws: How many times to draw.
        seed: Of the drawing.

    Returns:
        The 2.5 % and 97.5 % quantiles of the mean over all drawn rows.
    """
    generator = torch.Generator().manual_seed(seed)
    # SOLUTION: draw as many documents as there are, with replacement; sum of values over rows
    n = int(documents.max()) + 1
    totals = torch.zeros(n).index_add_(0, documents, values)
    sizes = documents.bincount().float()
    drawn = torch.randint(n, (draws, n), generator=generator)
    means = totals[drawn].sum(-1) / sizes[drawn].sum(-1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high
    # END


# %% tags=["wrong"]
def interval(values, documents, draws=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values[drawn].mean(-1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


# %% tags=["test"]
@check("5.2")
def _():
    values = torch.arange(20.0)
    once = interval(values, torch.arange(20))
    # Every row eight times: nothing new is known, so the interval must not shrink.
    often = interval(values.repeat_interleave(8), torch.arange(20).repeat_interleave(8))
    wide, narrow = once[1] - once[0], often[1] - often[0]
    assert abs(wide - narrow) < 0.2 * wide, f"copies of rows made it {wide:.1f} -> {narrow:.1f}"
    assert 4 < wide < 6, f"of 0 to 19 it is about 5 wide, found {wide:.1f}"
    scores = fve(nla.reconstruct(texts), vectors)
    low, high = interval(scores, documents)
    library = nla_lens.evaluate(
        table={"text": texts, "fve_nrm": scores.tolist(), "document": documents.tolist()},
        rows=["fve_nrm"],
    )["fve_nrm"]
    print(f"mean {scores.mean():.3f}: {low:.3f} to {high:.3f}")
    assert abs(low - library.low) < 0.02 and abs(high - library.high) < 0.02, "the library differs"
    print(f"nla_lens.evaluate says {library.low:.3f} to {library.high:.3f}")


# %% [markdown] tags=["hint"]
# Sum and count of each document once (`index_add_`, `bincount`); a draw then only says which documents count, and how often.

# %% [markdown]
# ## 3 What it quotes
#
# ### Exercise 5.3: quotations, and those of others
#
# > Difficulty 2 of 5 · importance 5 of 5 · 15 minutes
#
# A quotation can be looked up. In released pairs much of the score sits in quotations, and many of them are invented: one study found about none
# in the text, another 60 %. Case and spaces do not count. And the control: common words stand in any text, so some quotations of
# *other* explanations stand there, too.


# %% tags=["solution"]
def quotes_standing(texts, contexts, others):
    """The share of quotations that stand in the text read so far, and by chance.

    Args:
        texts: n explanations; a quotation is what stands between “ and ”, less a leading "…".
        contexts: n texts read so far.
        others: [n], for each row a row of another document.

    Returns:
        The share over all quotations; the same with each explanation held against the context of
        its other row.
    """
    # SOLUTION: find the quotations with re.findall, fold case and spaces, count them twice

    def folded(text):
        return " ".join(text.lower().split())

    def share(contexts):
        hits = [
            folded(quoted.removeprefix("…")) in folded(context)
            for text, context in zip(texts, contexts, strict=True)
            for quoted in re.findall("“([^”]+)”", text)
        ]
        return sum(hits) / len(hits)

    return share(contexts), share([contexts[i] for i in others])
    # END


# %% tags=["wrong"]
def quotes_standing(texts, contexts, others):
    hits = [
        quoted in context
        for text, context in zip(texts, contexts, strict=True)
        for quoted in re.findall("“([^”]+)”", text)
    ]
    return sum(hits) / len(hits), 0.0


# %% tags=["test"]
@check("5.3")
def _():
    toy = ["It says “… The  Cat”. Then “sat”.", "It ends with “dog”."]
    found = quotes_standing(toy, ["the cat sat", "a dog sat"], torch.tensor([1, 0]))
    assert abs(found[0] - 1) < 1e-6, f"all three stand there, case and spaces aside: {found[0]:.2f}"
    assert abs(found[1] - 1 / 3) < 1e-6, f"by chance only “sat” does: 1/3, found {found[1]:.2f}"
    share, chance = quotes_standing(texts, contexts, others)
    print(f"quotations that stand in the text: {share:.2f}; of other explanations: {chance:.2f}")


# %% [markdown] tags=["hint"]
# `re.findall("“([^”]+)”", text)` gives what is quoted; `str.removeprefix("…")` takes the dots off; `" ".join(text.lower().split())` folds.

# %% [markdown]
# ## 4 Sentence by sentence
#
# ### Exercise 5.4: what carries the signal
#
# > Difficulty 2 of 5 · importance 4 of 5 · 15 minutes
#
# Leave a sentence out and see how far the score falls: that is its **support**. A sentence whose support is about 0 is decoration, however
# good it sounds. The control is to leave out a sentence that says nothing.


# %% tags=["solution"]
def support(sentences, score):
    """How far the score falls without each sentence.

    Args:
        sentences: The sentences of one explanation, in order.
        score: `score(texts)` -> a list of scores against the vector, one for each text.

    Returns:
        One number for each sentence; positive where it is missed.
    """
    # SOLUTION: score the whole text and the text without each sentence; subtract
    without = [" ".join(sentences[:i] + sentences[i + 1 :]) for i in range(len(sentences))]
    whole, *rest = score([" ".join(sentences), *without])
    return [whole - each for each in rest]
    # END


# %% tags=["wrong"]
def support(sentences, score):
    return score(sentences)


# %% tags=["test"]
@check("5.4")
def _():
    toy = support(["a b.", "c.", "d e f."], lambda texts: [float(len(t.split())) for t in texts])
    assert toy == [2, 1, 3], f"with the number of words as score: [2, 1, 3], found {toy}"
    n = 3
    examined = nla_lens.examine(nla, vectors[n])
    claims = [c for c in examined.claims if c.kind == "sentence"]

    def score(texts):
        return nla.score(texts, vectors[n].expand(len(texts), -1)).fve_nrm.tolist()

    mine = support([c.text for c in claims], score)
    apart = max(abs(a - c.support) for a, c in zip(mine, claims, strict=True))
    assert apart < 1e-3, f"nla_lens.examine differs by {apart:.3f}"
    *_, nothing = support([*(c.text for c in claims), "This is a text."], score)
    for value, claim in zip(mine, claims, strict=True):
        print(f"{value:5.2f}  {claim.text}")
    print(f"{nothing:5.2f}  This is a text. (added)")


# %% [markdown] tags=["hint"]
# Put the whole text and all shortened ones into one call of `score`: one batch instead of many.

# %% [markdown]
# ## 5 True of everybody
#
# ### Exercise 5.5: vagueness
#
# > Difficulty 3 of 5 · importance 4 of 5 · 10 minutes
#
# "You have a great need for other people to like you" is true, and says nothing: it is true of everybody. A text is vague as far as it fits
# *other* vectors as well as its own. Count it, and leave the text's own vector out, which would hide the difference.


# %% tags=["solution"]
def vagueness(scores):
    """For each text the share of other vectors that it fits at least as well as its own.

    Args:
        scores: [n, n], of text i against vector j.

    Returns:
        [n], from 0 (it is about its own vector) to 1.
    """
    # SOLUTION: compare each row with its diagonal entry; do not count the diagonal itself
    own = scores.diagonal()[:, None]
    fits = (scores >= own).float()
    return (fits.sum(-1) - 1) / (len(scores) - 1)
    # END


# %% tags=["wrong"]
def vagueness(scores):
    return (scores >= scores.diagonal()[:, None]).float().mean(-1)


# %% tags=["test"]
@check("5.5")
def _():
    toy = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.8, 0.7, 0.6]])
    found = vagueness(toy)
    assert torch.allclose(found, torch.tensor([0, 0.5, 1])), f"0, 1/2, 1; found {found.tolist()}"
    unit = torch.nn.functional.normalize
    rebuilt = unit(nla.reconstruct(texts), dim=-1)
    cos = rebuilt @ unit(vectors, dim=-1).T
    same = nla.reconstruct(["This is part of a text."]).expand_as(vectors)
    horoscope = unit(same, dim=-1) @ unit(vectors, dim=-1).T
    print(f"explanations: {vagueness(cos).mean():.3f}")
    print(f"permuted:     {vagueness(cos[others]).mean():.3f}")
    print(f"“This is part of a text.” for all: {vagueness(horoscope).mean():.3f}")


# %% [markdown] tags=["hint"]
# `scores.diagonal()[:, None]` stands beside each row. The diagonal is always at least as good as itself: subtract that one.

# %% [markdown]
# ## 6 A probability
#
# "`fve_nrm` is 0.97" does not answer "how likely is it that this is right?". Where errors are known, that can be learned:
# `nla_lens.calibrate` takes explanations with labels, fits a probability, and measures it on **other documents**. Here an explanation is
# called right if all that it quotes stands in the text.

# %%
calibration = nla_lens.calibrate(nla, written, budget=200, progress=False)
calibration

# %% [markdown]
# ### Exercise 5.6: what is left out
#
# > Difficulty 2 of 5 · importance 4 of 5 · 15 minutes
#
# What such a number is good for: leave out the least trusted explanations, and fewer of the rest are wrong. The control: leave out as many
# at random, and nothing changes, on average.


# %% tags=["solution"]
def wrong_among_kept(trust, right, keep):
    """The share of wrong explanations among the most trusted ones, and without choosing.

    Args:
        trust: [n].
        right: [n], bool.
        keep: The share that is kept, above 0; rounded to whole explanations, at least one.

    Returns:
        The share wrong among the kept; what is to be expected of as many kept at random.
    """
    # SOLUTION: sort by trust, keep the first, count the wrong ones; at random: the overall share
    n = max(1, round(keep * len(trust)))
    kept = trust.argsort(descending=True)[:n]
    wrong = (~right).float()
    return wrong[kept].mean().item(), wrong.mean().item()
    # END


# %% tags=["wrong"]
def wrong_among_kept(trust, right, keep):
    kept = trust.argsort()[: round(keep * len(trust))]
    return (~right).float()[kept].mean().item(), 0.5


# %% tags=["test"]
@check("5.6")
def _():
    trust = torch.tensor([0.9, 0.2, 0.8, 0.4])
    right = torch.tensor([True, False, True, False])
    assert wrong_among_kept(trust, right, 0.5) == (0, 0.5), "the two most trusted are right"
    assert wrong_among_kept(trust, right, 0.01) == (0, 0.5), "at least one is kept"
    assert wrong_among_kept(-trust, right, 0.5)[0] == 1, "the other way round both are wrong"
    # Explanations of documents that the calibration has not seen.
    fresh = [d.text for d in corpus.documents(seed=5_000_001, count=20)]
    read = nla_lens.extract(
        nla.spec.source_model, fresh, nla.spec.layer, positions=slice(4, None, 5)
    )
    trusts, rights = [], []
    for text, r in zip(fresh, read, strict=True):
        ids = tokenizer(text).input_ids
        for e in nla.explain(r, progress=False).flat:
            context = tokenizer.decode(ids[: e.position + 1], skip_special_tokens=True)
            quoted = [c for c in nla_lens.examine(nla, e, context=context) if c.kind == "quote"]
            if quoted:
                trusts.append(e.trust)
                rights.append(all(c.in_context for c in quoted))
    trust, right = torch.tensor(trusts), torch.tensor(rights)
    for keep in (1.0, 0.8, 0.6):
        found, chance = wrong_among_kept(trust, right, keep)
        print(f"{keep:.0%} of {len(right)} kept: {found:.1%} wrong; kept at random {chance:.1%}")
    assert wrong_among_kept(trust, right, 0.6)[0] < wrong_among_kept(trust, right, 0.6)[1]


# %% [markdown] tags=["hint"]
# `argsort(descending=True)[:n]` are the most trusted. What share of wrong ones do you expect of a random choice?

# %% [markdown]
# ## All of it at once
#
# `nla_lens.evaluate` takes these measures and more, each with its control, an interval over documents and a verdict. A control that
# beats its measure is the headline.

# %%
report = nla_lens.evaluate(
    nla,
    written,
    budget=100,
    rows=["fve_nrm", "floor_constant", "floor_permuted", "retrieval", "quotes", "vagueness"],
    progress=False,
)
for row in report.values():
    print(f"{row.name:15} {row.value:6.2f} [{row.low:5.2f}, {row.high:5.2f}]")
    print(f"    control {row.control:5.2f} ({row.control_name})")
    if row.public:
        print(f"    published: {row.public}")

# %%
if PAIR == "tiny":
    assert report["fve_nrm"].low > 0.9 > 0 > report["floor_constant"].high
    assert report["quotes"].low > 0.6 > 0.3 > report["quotes"].control
    assert report["vagueness"].high < 0.05 and calibration.held_out["auroc"] > 0.8

# %% [markdown]
# ## And in a natural model
#
# `tiny` was made to be legible, and its score is nearly perfect. `smol`, which is in the package, too (its source model comes by `make smol`), reads block 4 of a
# language model of 135 million parameters, and what it gets wrong it gets wrong as natural NLAs do. The same measures, on documents of sources it was not trained on:
#
# | | `tiny` | `smol` |
# |---|---|---|
# | fve_nrm | 0.98 | 0.76 |
# | fve_nrm of texts of other documents | -1.00 | -0.85 |
# | the true last token alone, as a text | -0.37 | 0.51 |
# | its own vector is the nearest of 100 | 1.00 | 0.88 |
# | it names the token right | 1.00 | 0.97 |
# | it names the token before it right | | 0.29 |
# | AUROC of trust, on other documents | 0.95 | 0.84 |
# | AUROC of fve_nrm alone | 0.83 | 0.70 |
#
# A score of 0.76 is what the pairs of large models reach, and yet the word before is wrong in seven lines of ten: a text that names the last token alone has two
# thirds of that score. Where `smol` is wrong, it is often near ("countries signed" for "governments signed"), which the score rewards and the label does not. Put
# `PAIR = "smol"` at the top, and texts of your own in place of the corpus, and look at what it says of them.

# %% [markdown]
# ## What to take with you
#
# * A score without its floor is no result, and rows of one document are not independent.
# * Quotations can be looked up. Do it: prose can be right and each quotation wrong.
# * A sentence without support is decoration.
# * Trust is a probability that was tested on other documents, or it is a mood.
