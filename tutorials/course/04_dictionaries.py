# requires: transformer-lens>=2.18
# %% [markdown]
# # 4 · Dictionaries
#
# **Claim.** Of residuals of the embedded pair's source model a sentence keeps more than a dictionary's eight latents do; a sentence about a
# *direction* of the dictionary is a guess. Evidence, over 120 vectors: `fve` 0.95 for words and 0.85 for the dictionary; of 24 labels of directions
# 33 % have a word of what their latent fires on, of texts for residuals 92 %. Control: words handed on to another vector -1.01; words of the next
# latent's places 8 % both times.
#
# The source model's residuals were trained to be sums of what explanations say (`tiny_nla/MODEL_CARD.md`), so words do better here than they would on
# a model that grew up by itself. The dictionary (512 latents, BatchTopK with L0 8, trained by `tutorials/tiny_sae/train.py` with SAELens) had no such help.
#
# **You will** compute latents by hand, keep the ones that matter, put directions into words and find out how often that is right, and measure what
# either language loses of the model's own predictions.
#
# **You need** notebook 1; to have heard of sparse autoencoders (SAEs).
#
# | section | minutes |
# |---|---|
# | 1 Two languages for one vector | 10 |
# | 2 Latents by hand | 30 |
# | 3 Directions in words | 30 |
# | 4 What the model loses | 20 |

# %%
import re

import torch
from course_tools import boot, check
from safetensors.torch import load_file

import nla_lens
from nla_lens.adapters.sae import decompose, explain_features, label_score, load_dictionary

PAIR, DICTIONARY = "tiny", str(TUTORIALS / "tiny_sae" / "dictionary")
# A released pair; a dictionary of its source model and block is yours to choose: SAELens, Goodfire,
# qresearch, Gemma Scope 2, sparsify, dictionary_learning, Llama Scope; a directory or on the hub.
# PAIR, DICTIONARY = "kitft/Llama-3.3-70B-NLA-L53", "Goodfire/Llama-3.3-70B-Instruct-SAE-l50"

# %% [markdown]
# ## 1 Two languages for one vector
#
# A sparse dictionary writes a residual vector as a short sum of directions, its *latents*. An NLA writes it as a sentence. Both read the
# same vector, and both rebuild it.

# %%
nla = nla_lens.NLA.from_pretrained(PAIR)
sae = load_dictionary(DICTIONARY)
model = boot(nla.spec.source_model)
K, HOOK = nla.spec.layer, nla.spec.hook_name
TEXT = "Nora lives in Naples. The fox chased the dog out of the kennel."

with nla_lens.attach(model, nla):
    logits, cache = model.run_with_cache(TEXT)
both = decompose(nla, sae, cache["resid_post", K][0, -1], top=4)
print("the NLA:", both.explanation.text)
for latent in both.latents:
    print(f"latent {latent.index:3} {latent.contribution:5.1f}  {latent.text}")
print(f"fve: sae {both.sae.fve_nrm:.2f}, nla {both.nla.fve_nrm:.2f}")

# %%
sys.path.insert(0, str(TUTORIALS / "tiny_nla"))
import corpus

written = [d.text for d in corpus.documents(seed=4_000_001, count=200)]
residuals = nla_lens.extract(nla.spec.source_model, written, K, positions=slice(1, None))
vectors = torch.cat([r.as_ordinary() for r in residuals])
print(len(vectors), "vectors of", len(written), "documents")

# %% [markdown]
# ## 2 Latents by hand
#
# ### Exercise 4.1: encode
#
# > Difficulty 2 of 5 · importance 4 of 5 · 15 minutes
#
# With x a vector: `pre = (x - b_dec) W_enc + b_enc`. A *jumprelu* latent is `pre` where that is above the latent's threshold, else 0. (A
# BatchTopK dictionary is one, once it is trained.) Leave the threshold out, and a hundred latents fire where eight should.


# %% tags=["solution"]
def encode(x, tensors):
    """Latents of vectors.

    Args:
        x: [n, d].
        tensors: `W_enc` [d, d_sae], `b_enc`, `b_dec`, `threshold`, float32.

    Returns:
        [n, d_sae].
    """
    # SOLUTION: subtract b_dec, multiply, add b_enc; keep what is above the threshold (and above 0)
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    return torch.where(pre > tensors["threshold"], pre, 0).relu()
    # END


# %% tags=["wrong"]
def encode(x, tensors):
    return ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()


# %% tags=["test"]
@check("4.1")
def _():
    stored = load_file(str(TUTORIALS / "tiny_sae" / "dictionary" / "sae_weights.safetensors"))
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    mine, library = (
        encode(vectors, tensors),
        load_dictionary(TUTORIALS / "tiny_sae" / "dictionary").encode(vectors),
    )
    sizes = [(f > 0).sum(-1).float().mean().item() for f in (mine, library)]
    assert abs(sizes[0] - sizes[1]) < 0.01, f"{sizes[0]:.1f} latents at once, not {sizes[1]:.1f}"
    apart = (mine - library).abs().max().item()
    assert apart < 1e-3, f"a latent differs by {apart:.3f}"
    print(f"{sizes[0]:.1f} of {mine.shape[1]} latents at once")


# %% [markdown] tags=["hint"]
# `torch.where(condition, pre, 0)`.

# %% [markdown]
# ### Exercise 4.2: the ones that matter, and as many at random
#
# > Difficulty 3 of 5 · importance 4 of 5 · 15 minutes
#
# What a latent adds to the vector is its value *times its direction*: a latent with a large value and a short direction adds little. Keep the k that
# add most. And the control: k of the active ones at random.


# %% tags=["solution"]
def strongest(latents, directions, k):
    """All but the k latents of each row that add the longest vectors set to 0.

    Args:
        latents: [n, d_sae].
        directions: [d_sae, d].
        k: How many are kept.
    """
    # SOLUTION: multiply by the directions' norms, take topk, keep the latents there
    added = latents * directions.norm(dim=-1)
    kept = torch.zeros_like(latents).scatter_(-1, added.topk(k, dim=-1).indices, 1.0)
    return latents * kept
    # END


def random_ones(latents, k, seed=0):
    """All but k of each row's active latents, drawn at random, set to 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(latents.shape, generator=generator)
    # SOLUTION: give what is not active a draw below all others, take topk, keep the latents there
    drawn = torch.where(latents > 0, drawn, -1.0)
    kept = torch.zeros_like(latents).scatter_(-1, drawn.topk(k, dim=-1).indices, 1.0)
    return latents * kept
    # END


# %% tags=["wrong"]
def strongest(latents, directions, k):
    kept = torch.zeros_like(latents).scatter_(-1, latents.topk(k, dim=-1).indices, 1.0)
    return latents * kept


def random_ones(latents, k, seed=0):
    return latents * (torch.rand(latents.shape) < k / latents.shape[-1])


# %% tags=["test"]
directions = sae.rows(range(sae.cfg.d_sae))


def fve(rebuilt, vectors):
    """fve_nrm, mean over rows."""
    unit = torch.nn.functional.normalize
    cos = (unit(rebuilt, dim=-1) * unit(vectors, dim=-1)).sum(-1)
    return (1 - 2 * (1 - cos) / nla.spec.var_nrm).mean().item()


@check("4.2")
def _():
    toy, rows = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 0], [5, 0], [0, 0.1]])
    found = strongest(toy, rows, 1)
    assert found.tolist() == [[0, 2, 0]], f"2 times a direction of length 5 adds most: {found}"
    for seed in range(5):
        one = random_ones(torch.tensor([[0.0, 2, 0, 1, 4]]), 2, seed)
        assert (one > 0).sum() == 2, f"two active ones are kept: {one.tolist()}"
    latents = sae.encode(vectors)
    for k in (1, 2, 4, 8):
        best = fve(sae.decode(strongest(latents, directions, k)), vectors)
        chance = fve(sae.decode(random_ones(latents, k)), vectors)
        print(f"{k} latents: fve {best:5.2f}; {k} of the active ones at random {chance:5.2f}")


# %% [markdown] tags=["hint"]
# `torch.zeros_like(x).scatter_(-1, indices, 1.0)` is 1 at the indices and 0 elsewhere.

# %% [markdown]
# ## 3 Directions in words
#
# The AV was trained on residuals. A direction of a dictionary is no residual; it can be read all the same, without a single text on which the latent
# fires. Whether that is right is another question.

# %%
latents = sae.encode(vectors)
added = latents * directions.norm(dim=-1)
often = ((latents > 0).sum(0) >= 20).nonzero()[:, 0]
chosen = often[added[:, often].amax(0).argsort(descending=True)[:24]].tolist()
labels = [e.text for e in explain_features(nla, sae, chosen)]
for index, label in list(zip(chosen, labels, strict=True))[:4]:
    print(index, label)

# %% [markdown]
# ### Exercise 4.3: does a label find its direction?
#
# > Difficulty 2 of 5 · importance 4 of 5 · 15 minutes
#
# The AR turns a label back into a vector. A cosine alone says little, since AR vectors all lie where residuals are. So count: how many *other* directions
# fit the label better than its own? The control: labels handed on by one.


# %% tags=["solution"]
def ranks(rebuilt, rows):
    """For each label how many other directions fit it better than its own, 0 at best.

    Args:
        rebuilt: [n, d], of the labels.
        rows: [m, d], m >= n; label i belongs to row i.

    Returns:
        [n], integers.
    """
    # SOLUTION: cosines of all pairs; count the ones above each label's own
    unit = torch.nn.functional.normalize
    cos = unit(rebuilt, dim=-1) @ unit(rows, dim=-1).T
    return (cos > cos.diagonal()[:, None]).sum(-1)
    # END


# %% tags=["wrong"]
def ranks(rebuilt, rows):
    fit = rebuilt @ rows.T
    return (fit > fit.diagonal()[:, None]).sum(-1)


# %% tags=["test"]
@check("4.3")
def _():
    toy = torch.eye(3)
    long = torch.cat([toy, torch.full((1, 3), 9.0)])
    assert ranks(toy, long).tolist() == [0, 0, 0], "lengths of directions do not count"
    assert ranks(toy.roll(1, 0), toy).tolist() == [1, 1, 1], "of two others one fits better"
    others = [i for i in often.tolist() if i not in chosen]
    rows = directions[[*chosen, *others]]
    rebuilt = nla.reconstruct(labels)
    mine, swapped = ranks(rebuilt, rows), ranks(rebuilt.roll(1, 0), rows)
    library = label_score(nla, labels, directions[chosen], others=directions[others]).rank
    assert mine.tolist() == library.tolist(), "nla_lens.adapters.sae.label_score differs"
    print(f"median rank of the own direction: {mine.median()} of {len(rows)}; ", end="")
    print(f"labels handed on: {swapped.median()}")


# %% [markdown] tags=["hint"]
# Row i of the cosines belongs to label i; `cos.diagonal()[:, None]` is its own, beside each row.

# %% [markdown]
# ### Exercise 4.4: does it name what the latent fires on?
#
# > Difficulty 3 of 5 · importance 5 of 5 · 15 minutes
#
# The AR and the AV come from one training; they may agree on nonsense. So look at the texts: where is the latent strongest, and does the label have a
# **word** of what stands there? Common words are in every label, so the same is counted for another latent's label.


# %% tags=["solution"]
def named(labels, snippets, common):
    """The share of labels that have a word of their own snippets, and of the next latent's.

    Args:
        labels: n texts.
        snippets: n lists of texts, where the latent is strongest.
        common: Words, in lower case, that do not count.

    Returns:
        Two shares.
    """

    # SOLUTION: sets of lower-case words by re.findall, less the common ones; share that meet
    def words(text):
        return set(re.findall("[a-z]+", text.lower())) - set(common)

    def share(snippets):
        pairs = zip(labels, snippets, strict=True)
        return sum(bool(words(a) & words(" ".join(b))) for a, b in pairs) / len(labels)

    return share(snippets), share([*snippets[1:], snippets[0]])
    # END


# %% tags=["wrong"]
def named(labels, snippets, common):
    hits = [
        bool(set(a.split()) & set(" ".join(b).split()))
        for a, b in zip(labels, snippets, strict=True)
    ]
    return sum(hits) / len(hits), 0.0


# %% tags=["test"]
COMMON = "the a an of in is on so to and it was with for at no not by far this".split()
tokens = [(r, i) for r in residuals for i in range(len(r))]


def strongest_places(index, n=5, width=3):
    """Where a latent is strongest: the token and those before it."""
    found = []
    for place in latents[:, index].topk(n).indices.tolist():
        r, i = tokens[place]
        origin = r.origin
        ids = origin.where_LX3[max(i - width + 1, 0) : i + 1, 2].tolist()
        found.append("".join(origin.to_token(t) for t in ids))
    return found


@check("4.4")
def _():
    places = [["the dog ran"], ["the cat", "dogs, a dog"], ["a red one"]]
    toy = named(["Dog.", "the end", "red cat"], places, {"the"})
    assert toy == (2 / 3, 1 / 3), f"“dog”, “red”; “dog” of the next; “the” does not count: {toy}"
    snippets = [strongest_places(i) for i in chosen]
    own, other = named(labels, snippets, COMMON)
    print(f"labels of directions: {own:.2f}; of the next latent {other:.2f}")
    # The same for a residual on which the latent is strongest: what the AV was trained to read.
    places = [int(latents[:, i].argmax()) for i in chosen]
    read = [e.text for e in nla.explain(vectors[places], progress=False)]
    own, other = named(read, snippets, COMMON)
    print(f"texts of residuals where it is strongest: {own:.2f}; of the next latent {other:.2f}")
    print(f"latent {chosen[0]}: {labels[0]}\n    strongest at {snippets[0]}")


# %% [markdown] tags=["hint"]
# `set(re.findall("[a-z]+", text.lower())) - set(common)`; two sets meet where `a & b` is not empty.

# %% [markdown]
# So read a text for a direction as a guess, and check it on real residuals. `tutorials/tiny_sae/judge.py` does that on 50 latents with a stricter count
# (`tiny_sae/RESULTS.md`).
#
# ## 4 What the model loses
#
# ### Exercise 4.5: loss recovered
#
# > Difficulty 3 of 5 · importance 5 of 5 · 20 minutes
#
# Put a reconstruction into the model instead of the vector, and let it go on. What it then predicts worse is what the language has lost. "The loss rises
# by 0.4" needs a scale: with the mean vector everywhere (all is lost) it rises by so much; that is 0 %, and the untouched run is 100 %.


# %% tags=["solution"]
def loss_with(model, ids, hook_name, change):
    """The model's next-token loss with its residual stream changed at one place.

    Args:
        model: In TransformerLens.
        ids: [1, T].
        hook_name: Where.
        change: [T, d] -> [T, d].
    """

    # SOLUTION: run_with_hooks, return_type loss, and a hook that returns the changed stream
    def hook(resid, hook):
        return change(resid[0])[None]

    return model.run_with_hooks(ids, return_type="loss", fwd_hooks=[(hook_name, hook)]).item()
    # END


def recovered(clean, changed, ablated):
    """The share of the loss that is recovered: 1 for the untouched run, 0 for the ablated one."""
    # SOLUTION: how far changed is from ablated, over how far clean is from it
    return (ablated - changed) / (ablated - clean)
    # END


# %% tags=["wrong"]
def loss_with(model, ids, hook_name, change):
    return model(change(ids), return_type="loss").item()


def recovered(clean, changed, ablated):
    return clean / changed


# %% tags=["test"]
def like(rebuilt, x):
    """Rebuilt directions at the length of the vectors; the first token is left as it is."""
    unit = torch.nn.functional.normalize
    return torch.cat([x[:1], unit(rebuilt, dim=-1)[1:] * x[1:].norm(dim=-1, keepdim=True)])


@check("4.5")
def _():
    assert recovered(1.0, 1.0, 3.0) == 1 and recovered(1.0, 3.0, 3.0) == 0, "1 and 0 at the ends"
    assert abs(recovered(1.0, 1.5, 3.0) - 0.75) < 1e-6, "a quarter is lost"
    mean = vectors.mean(0)
    changes = {
        "untouched": lambda x: x,
        "the mean vector": lambda x: torch.cat([x[:1], mean.expand_as(x[1:])]),
        "the dictionary": lambda x: like(sae.decode(sae.encode(x)), x),
        "the NLA's words": lambda x: like(nla(x, progress=False), x),
        "words of other positions": lambda x: like(nla(x, progress=False).roll(5, 0), x),
    }
    losses = dict.fromkeys(changes, 0.0)
    stories = [TEXT, *(text for text in written if len(text.split()) > 15)][:4]
    with torch.no_grad():
        for text in stories:
            ids = model.to_tokens(text)
            for name, change in changes.items():
                losses[name] += loss_with(model, ids, HOOK, change) / len(stories)
            plain = model(ids, return_type="loss").item()
            same = loss_with(model, ids, HOOK, lambda x: x)
            assert abs(plain - same) < 1e-4, f"nothing changed, but {plain:.2f} became {same:.2f}"
    ends = losses["untouched"], losses["the mean vector"]
    for name, loss in losses.items():
        print(f"{name:25} loss {loss:5.2f}, recovered {recovered(ends[0], loss, ends[1]):6.0%}")


# %% [markdown] tags=["hint"]
# `model.run_with_hooks(ids, return_type="loss", fwd_hooks=[(hook_name, hook)])`; the hook gets `(resid, hook)`, resid [1, T, d].

# %% [markdown]
# ## The claim
#
# On the same vectors, and on one scale:

# %%
some = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:120]]
words = nla(some, progress=False)
dictionary = fve(sae.decode(sae.encode(some)), some)
print(f"fve: words {fve(words, some):.2f}, dictionary {dictionary:.2f};", end=" ")
print(
    f"words handed on {fve(words.roll(1, 0), some):.2f}, the mean vector {fve(some.mean(0).expand_as(some), some):.2f}"
)
if PAIR == "tiny":
    assert fve(words, some) > dictionary > 0.8 > 0 > fve(words.roll(1, 0), some)

# %% [markdown]
# ## What to take with you
#
# * A threshold left out, or a sum taken for a product with the direction's length: a dictionary misread still decodes.
# * A label is a guess until it was held against what the latent fires on, and against another latent's label.
# * Losses need both ends of a scale.
#
# Whole dictionaries go into a store that a later run goes on with: `nla-lens features DICTIONARY --out latents.jsonl`.
