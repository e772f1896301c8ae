# %% [markdown]
# # 7 · Injection from scratch
#
# **Claim.** Thirty lines of plain transformers code give the *same tokens* as `nla_lens`, for both injection rules, with the embedded
# pairs `tiny` and `tiny-norm-matched`. Evidence: greedy token ids of 8 vectors, equal one by one. Control: each of five usual mistakes in
# the injection costs `fve_nrm` (0.99 falls to between 0.78 and -1.02), and most of them write as fluently as before.
#
# **You will** render the verbalizer's prompt, find the one place where a vector may go, scale it, put it in by a forward hook that
# acts once, and see each way to get that wrong.
#
# **You need** notebook 1, and to have written a forward hook once.
#
# | section | minutes |
# |---|---|
# | 1 The prompt and the place | 20 |
# | 2 The vector | 10 |
# | 3 In it goes | 25 |
# | 4 Is it read? | 15 |
# | 5 The other rule | 15 |
# | 6 Every trap made visible | 10 |

# %%
import torch
from course_tools import check

import nla_lens

PAIR = "tiny"  # A released pair with the replace rule: "kitft/nla-qwen2.5-7b-L20"

# %% [markdown]
# Only two things are taken from the library: what the checkpoint's sidecar says (`nla.spec`), and its answers, to compare with.

# %%
nla = nla_lens.NLA.from_pretrained(PAIR)
spec = nla.spec
av, tokenizer = nla.verbalizer.engine.model, nla.verbalizer.tokenizer
embedding = av.get_input_embeddings()
print(f"rule {spec.injection}, scale {spec.injection_scale}, prompt:\n{spec.av_template}")

texts = [
    "Nora lives in Naples. The fox chased the dog out of the kennel.",
    "The soil was too dry for the tulips.",
]
residuals = nla_lens.extract(spec.source_model, texts, spec.layer, positions=[4, 6, 8, -1])
vectors = torch.cat([r.as_ordinary() for r in residuals])
expected = nla.explain(vectors, progress=False)
print(f"\n{len(vectors)} vectors; what the library says of the first: {expected[0].text}")

# %% [markdown]
# ## 1 The prompt and the place
#
# ### Exercise 7.1: token ids of the prompt
#
# > Difficulty 2 of 5 · importance 5 of 5 · 10 minutes
#
# One user turn, rendered by the chat template, tokenized **once**, with what lets the model begin its answer. Two traps: a template that
# is rendered to a string and tokenized *again* gets a second BOS token (on Llama and Gemma), and everything moves by one. And
# `apply_chat_template` gives a list in transformers 4 and a dictionary in transformers 5.


# %% tags=["solution"]
def prompt_ids(tokenizer, content):
    """Token ids of one user turn, and the beginning of the answer.

    Args:
        tokenizer: With a chat template.
        content: What the user says.

    Returns:
        A list of ints.
    """
    # SOLUTION: call apply_chat_template once, with tokenize=True and add_generation_prompt=True
    turns = [{"role": "user", "content": content}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)
    return list(ids if isinstance(ids, list) else ids["input_ids"])
    # END


# %% tags=["wrong"]
def prompt_ids(tokenizer, content):
    turns = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text).input_ids


# %% tags=["test"]
@check("7.1")
def _():
    content = spec.av_template.replace("{injection_char}", spec.injection_char)
    mine, library = prompt_ids(tokenizer, content), list(nla.verbalizer.prompt_ids)
    first = mine.count(tokenizer.bos_token_id), library.count(tokenizer.bos_token_id)
    assert first[0] == first[1], f"{first[0]} BOS tokens instead of {first[1]}"
    assert mine == library, f"{mine} instead of {library}"
    print(len(mine), "tokens:", tokenizer.convert_ids_to_tokens(mine))


# %% [markdown] tags=["hint"]
# `tokenizer.apply_chat_template([{"role": "user", "content": content}], ...)`. Look at the type of what it returns before you use it.

# %% [markdown]
# ### Exercise 7.2: the one place
#
# > Difficulty 2 of 5 · importance 4 of 5 · 10 minutes
#
# The vector goes to the marker token. But a prompt may have that token twice: somebody writes it into the text, or a template does. The sidecar
# names the tokens left and right of the true one. Not exactly one place is an error. **Never a guess**: a vector in the wrong place
# is not read, and the text is fluent all the same.


# %% tags=["solution"]
def marker_position(ids, marker, left, right):
    """Where the vector goes.

    Args:
        ids: The prompt's token ids.
        marker: The marker's id.
        left: The id that must stand before it.
        right: The id that must stand behind it.

    Raises:
        ValueError: Not exactly one place.
    """
    # SOLUTION: collect every place where marker stands between left and right; one is needed
    places = [i for i in range(1, len(ids) - 1) if ids[i - 1 : i + 2] == [left, marker, right]]
    if len(places) != 1:
        raise ValueError(f"{len(places)} places for the vector, exactly one is needed")
    return places[0]
    # END


# %% tags=["wrong"]
def marker_position(ids, marker, left, right):
    return ids.index(marker)


# %% tags=["test"]
@check("7.2")
def _():
    assert marker_position([5, 9, 5, 1, 9, 2], 9, 1, 2) == 4, "the neighbours decide"
    for none in ([1, 2, 3], [1, 9, 2, 1, 9, 2], [9, 2], [1, 9]):
        try:
            place = marker_position(none, 9, 1, 2)
        except ValueError:
            continue
        raise AssertionError(f"{none} has not exactly one place, and {place} was returned")
    ids = list(nla.verbalizer.prompt_ids)
    at = ids.index(spec.injection_token_id)
    place = marker_position(ids, ids[at], ids[at - 1], ids[at + 1])
    assert place == nla.verbalizer.marker_position, f"{place} is not the library's"
    print(f"the vector goes to position {place} of {len(ids)}")


# %% [markdown] tags=["hint"]
# Compare three tokens at a time, `ids[i - 1 : i + 2]`. What can be wrong at the ends of the list?

# %% [markdown]
# ## 2 The vector
#
# ### Exercise 7.3: its length
#
# > Difficulty 1 of 5 · importance 5 of 5 · 5 minutes
#
# `injection_scale` is the norm that the vector **gets**, not a factor. And a norm is a sum of many squares: bfloat16, in which large
# models run, has 8 bits for it. Take it in float32, whatever the vector's dtype.


# %% tags=["solution"]
def rescaled(vectors, norm):
    """Vectors of the given norm.

    Args:
        vectors: [..., d] of any float dtype.
        norm: What norm they get.

    Returns:
        [..., d], float32.
    """
    # SOLUTION: to float32 first, then divide by the norm and multiply by the wanted one
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True) * norm
    # END


# %% tags=["wrong"]
def rescaled(vectors, norm):
    return vectors.float() * norm


# %% tags=["wrong"]
def rescaled(vectors, norm):
    return (vectors / vectors.norm(dim=-1, keepdim=True) * norm).float()


# %% tags=["test"]
@check("7.3")
def _():
    scaled = rescaled(vectors, spec.injection_scale)
    norms = scaled.norm(dim=-1)
    assert torch.allclose(norms, torch.full_like(norms, spec.injection_scale)), (
        f"norm {norms[0]:.2f}"
    )
    half = rescaled(vectors.bfloat16(), 1.0)
    assert half.dtype == torch.float32, f"float32 is wanted, found {half.dtype}"
    off = (half.norm(dim=-1) - 1).abs().max().item()
    assert off < 1e-6, (
        f"with bfloat16 vectors the norm is off by {off:.1e}: it was not taken in float32"
    )
    raw = vectors.norm(dim=-1)
    print(f"norms were {raw.min():.1f} to {raw.max():.1f}, and are {spec.injection_scale} now")


# %% [markdown]
# ## 3 In it goes
#
# ### Exercise 7.4: a hook that acts once
#
# > Difficulty 4 of 5 · importance 5 of 5 · 20 minutes
#
# What replaces the marker's embedding is what **enters block 0**: a forward hook on the embedding module may return a new output. (For
# Gemma the module multiplies by √d inside; a hook on its output comes after that, as it should.)
#
# The hook fires on every pass. With a key-value cache the prompt is one pass, and each written token another one of length 1, in which
# position p does not exist, or is something else. Act on the prompt alone.


# %% tags=["solution"]
def injecting(scaled, position, n_prompt):
    """A forward hook for the embedding module.

    Args:
        scaled: [batch, d], what the rows get.
        position: Where.
        n_prompt: How many tokens the prompt has; a pass of another length is left alone.

    Returns:
        A function `hook(module, args, output)`; output is [batch, tokens, d]. It returns a changed
        copy, or None where nothing is to change.
    """

    def hook(module, args, output):
        # SOLUTION: on the prompt's pass return a copy with the rows at position replaced
        if output.shape[1] != n_prompt:
            return None
        changed = output.clone()
        changed[:, position] = scaled.to(output)
        return changed
        # END

    return hook


# %% tags=["wrong"]
def injecting(scaled, position, n_prompt):
    def hook(module, args, output):
        changed = output.clone()
        changed[:, min(position, output.shape[1] - 1)] = scaled.to(output)
        return changed

    return hook


# %% tags=["wrong"]
def injecting(scaled, position, n_prompt):
    def hook(module, args, output):
        if output.shape[1] != n_prompt:
            return None
        changed = output.clone()
        changed[:, position] += scaled.to(output)
        return changed

    return hook


# %% [markdown]
# Greedy decoding, written out: one pass for the prompt, then one for each token. (The name of what holds the cache has changed in
# transformers; what a pass returns says which it is.)

# %%
ids = torch.tensor(nla.verbalizer.prompt_ids)
position = nla.verbalizer.marker_position
ends = nla.verbalizer.engine.eos_ids


@torch.no_grad()
def greedy(module, hook, most=80):
    """Token ids that the verbalizer writes while a hook stands on one of its modules."""
    handle = module.register_forward_hook(hook)
    try:
        out, written = av(ids[None], use_cache=True), []
        while len(written) < most:
            written.append(int(out.logits[0, -1].argmax()))
            if written[-1] in ends:
                break
            name = "past_key_values" if "past_key_values" in out else "cache"
            out = av(torch.tensor([written[-1:]]), use_cache=True, **{name: out[name]})
    finally:
        handle.remove()
    return written


def equal(written, explanation):
    """Whether these are the library's token ids; it stops at the closing tag, not at the end."""
    return written[: len(explanation.token_ids)] == list(explanation.token_ids)


def said(written):
    """What stands between the tags."""
    text = tokenizer.decode(written, skip_special_tokens=True)
    return text.split("<explanation>")[-1].split("</explanation>")[0].strip()


# %% tags=["test"]
@check("7.4")
def _():
    scale = spec.injection_scale
    hooks = [injecting((scale * v / v.norm())[None], position, len(ids)) for v in vectors]
    plain = embedding(ids[None])
    kept = plain.clone()
    entered = hooks[0](embedding, (), plain)
    assert torch.equal(plain, kept), "the module's own output was written into; change a copy"
    library = nla.verbalizer.prompt_embeds(vectors[:1])
    assert torch.allclose(entered, library, atol=1e-5), "this is not what should enter block 0"
    one = embedding(ids[None, :1])
    step = hooks[0](embedding, (), one)
    assert step is None or torch.equal(step, one), "a pass of one token must be left alone"
    answers = [greedy(embedding, hook) for hook in hooks]
    same = [equal(a, e) for a, e in zip(answers, expected, strict=True)]
    assert all(same), f"{sum(same)} of {len(same)} answers are the library's"
    print(f"{sum(same)} of {len(same)} answers are the library's, token by token")


# %% [markdown] tags=["hint"]
# `output.shape[1]` is the number of tokens in this pass. A hook that returns None changes nothing.

# %% [markdown] tags=["hint"]
# `changed = output.clone()`, then set `changed[:, position]`, in the output's dtype (`scaled.to(output)`).

# %% [markdown]
# ## 4 Is it read?
#
# ### Exercise 7.5: the metric and its control
#
# > Difficulty 3 of 5 · importance 5 of 5 · 15 minutes
#
# A verbalizer whose injection does not work still writes. What it writes then depends on the prompt alone: whatever the vector, the same
# text. So measure how many *different* texts different vectors get, and hold it against a run in which nothing is injected.


# %% tags=["solution"]
def is_read(explain, vectors, injected):
    """How many different texts vectors get, with the injection and without.

    Args:
        explain: `explain(hook)` -> text, with a hook on the embedding module.
        vectors: [n, d].
        injected: `injected(vector)` -> the hook that puts it in.

    Returns:
        Two shares of n: different texts with the injection, and with hooks that change nothing.
    """
    # SOLUTION: count distinct texts over n for the injecting hooks, then for hooks that return None
    with_it = {explain(injected(v)) for v in vectors}
    without = {explain(lambda module, args, output: None) for _ in vectors}
    return len(with_it) / len(vectors), len(without) / len(vectors)
    # END


# %% tags=["wrong"]
def is_read(explain, vectors, injected):
    with_it = {explain(injected(v)) for v in vectors}
    return len(with_it) / len(vectors), 0.0


# %% tags=["test"]
@check("7.5")
def _():
    def fake(hook):
        out = hook(None, (), torch.zeros(1, 3, 2))
        return "nothing" if out is None else str(out.tolist())

    def put(v):
        return lambda module, args, output: output + v

    found = is_read(fake, torch.tensor([[1.0, 0], [1, 0], [2, 0], [3, 0]]), put)
    assert found == (0.75, 0.25), f"three different texts of four, one of four without: {found}"

    def inject(v):
        scaled = spec.injection_scale * v / v.norm()

        def hook(module, args, output):
            if output.shape[1] != len(ids):
                return None
            changed = output.clone()
            changed[:, position] = scaled
            return changed

        return hook

    read, blind = is_read(lambda hook: said(greedy(embedding, hook)), vectors, inject)
    print(f"different texts: {read:.0%} of {len(vectors)} with the injection, {blind:.0%} without")


# %% [markdown] tags=["hint"]
# A set comprehension counts different texts. The hook that changes nothing returns None.

# %% [markdown]
# ## 5 The other rule
#
# nanoNLA's checkpoints add instead of replacing, behind block 1, and match the norm of what is there (Karvonen et al., arXiv
# 2512.15674, eq. 1): `h'_p = h_p + ||h_p|| * v / ||v||`. The raw vector, no `injection_scale`.
#
# ### Exercise 7.6: norm-matched add
#
# > Difficulty 2 of 5 · importance 3 of 5 · 10 minutes


# %% tags=["solution"]
def norm_matched_add(resid, vectors, position):
    """A copy of a residual stream with the vectors added at one position.

    Args:
        resid: [batch, tokens, d], the output of block 1.
        vectors: [batch, d], of any length.
        position: Where.
    """
    # SOLUTION: add the unit vector times the norm of the residual that stands at position
    changed = resid.clone()
    at = resid[:, position]
    changed[:, position] = at + at.norm(dim=-1, keepdim=True) * vectors / vectors.norm(
        dim=-1, keepdim=True
    )
    return changed
    # END


# %% tags=["wrong"]
def norm_matched_add(resid, vectors, position):
    changed = resid.clone()
    changed[:, position] += vectors
    return changed


# %% tags=["test"]
@check("7.6")
def _():
    resid = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    added = norm_matched_add(resid, torch.tensor([[0.0, 2.0]]), 0)
    right = torch.tensor([[[3.0, 9.0], [1.0, 0.0]]])
    assert torch.allclose(added, right), f"{added[0, 0].tolist()} instead of {right[0, 0].tolist()}"
    if PAIR != "tiny":
        return
    global av
    replacing, other = av, nla_lens.NLA.from_pretrained("tiny-norm-matched")
    av = other.verbalizer.engine.model

    def hook_for(v):
        def hook(module, args, output):
            resid = output[0] if isinstance(output, tuple) else output
            if resid.shape[1] != len(ids):
                return None
            changed = norm_matched_add(resid, v[None], position)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    try:
        answers = [greedy(av.model.layers[1], hook_for(v)) for v in vectors]
    finally:
        av = replacing
    same = [equal(a, e) for a, e in zip(answers, other.explain(vectors), strict=True)]
    assert all(same), f"{sum(same)} of {len(same)} answers are the library's"
    print(f"{sum(same)} of {len(same)} answers are the library's, token by token")


# %% [markdown] tags=["hint"]
# `resid[:, position]` is [batch, d]; its norm, kept as [batch, 1], multiplies the unit vectors.

# %% [markdown]
# ## 6 Every trap made visible
#
# Each row is one mistake, made on purpose; everything else is right.

# %%
scale = spec.injection_scale


def at_prompt(change):
    """A hook that changes the prompt's pass alone."""

    def hook(module, args, output):
        return change(output.clone()) if output.shape[1] > 1 else None

    return hook


def put(v, where=0, norm=scale, add=False):
    """A change of the embeddings, right unless told otherwise."""

    def change(embeds):
        row = norm * v / v.norm()
        embeds[:, position + where] = row + (embeds[:, position + where] if add else 0)
        return embeds

    return change


def again_and_again(v):
    """Acts on the newest token of every pass, too."""

    def hook(module, args, output):
        changed = output.clone()
        changed[:, position if output.shape[1] > 1 else -1] = scale * v / v.norm()
        return changed

    return hook


traps = {
    "right": lambda v: at_prompt(put(v)),
    "scale taken for a factor": lambda v: at_prompt(put(v, norm=scale * v.norm())),
    "not scaled, norm 1": lambda v: at_prompt(put(v, norm=1.0)),
    "one position late": lambda v: at_prompt(put(v, where=1)),
    "nothing injected": lambda v: at_prompt(lambda embeds: embeds),
    "on every step": again_and_again,
}
means, shown = {}, {}
for name, hook_for in traps.items():
    answers = [said(greedy(embedding, hook_for(v), most=60)) for v in vectors]
    means[name] = nla.score([a or "." for a in answers], vectors).fve_nrm.mean().item()
    shown[name] = answers[3]
    same = sum(a == e.text for a, e in zip(answers, expected, strict=True))
    print(f"{name:26} fve_nrm {means[name]:6.2f}   {same} of {len(vectors)} texts right")

# %% [markdown]
# What they wrote for one vector, at the end of "The fox chased the dog out of the kennel." Without the scores, which of them would you have
# believed?

# %%
for name, text in shown.items():
    print(f"{name}:\n    {text[:140]}")

# %%
if PAIR == "tiny":
    right = means.pop("right")
    assert right > 0.9 and max(means.values()) < right, means

# %% [markdown]
# A mistake that costs little here may cost everything with another checkpoint, and the other way round: test the numbers that enter
# block 0, not the text. `nla-lens check CHECKPOINT` does that for any checkpoint. The symptom with the released pairs, whose marker is a CJK
# character: every text in Chinese, or English about a Chinese character, whatever the vector.
#
# ## What to take with you
#
# * Tokenize the chat once; find the marker by its neighbours; refuse when there is not exactly one.
# * The scale is the norm the vector gets, taken in float32.
# * Replace what enters block 0, on the prompt's pass, in a copy.
# * Fluency proves nothing: compare with the run in which nothing is injected.
