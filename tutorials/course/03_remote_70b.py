# requires: nnsight>=0.8; tenacity>=8.2
# %% [markdown]
# # 3 · The 70B on NDIF
#
# **Claim.** An NLA that runs on somebody else's machine says the same as one that runs here. Evidence: for the embedded pair `tiny` in nnsight's simulation
# of a server, the greedy token ids of 15 vectors are those of a local run, one by one. Control: vectors handed on by one position get other texts.
#
# This notebook runs offline: `ndif:local` is that simulation, in this process. For Llama-3.3-70B (AV 71 billion parameters, AR 47 billion) the one line
# below changes. That was not run here: the claim is about the code, not about the 70B.
#
# **You will** estimate what has to travel before you send anything, test that a remote run is the local one, and lose nothing when a server dies.
#
# **You need** notebook 2.
#
# | section | minutes |
# |---|---|
# | 1 Nothing is loaded here | 10 |
# | 2 What travels | 20 |
# | 3 Is it the same? | 15 |
# | 4 When it fails | 25 |

# %%
import torch
from course_tools import check

import nla_lens

PAIR, ENGINE, REMOTE = "tiny", "ndif:local", "local"
# PAIR, ENGINE, REMOTE = "kitft/Llama-3.3-70B-NLA-L53", "ndif", True  # after `nnsight login`

# %% [markdown]
# ## 1 Nothing is loaded here
#
# The models are built without weights, from their configs, so that nnsight knows their modules by name. Only the AR's last matrix, the value
# head, is here: after it the server would send back as many numbers as before it.

# %%
nla = nla_lens.NLA.from_pretrained(PAIR, engine=ENGINE)
devices = {p.device.type for p in nla.verbalizer.engine.model._module.parameters()}
print("the verbalizer's weights are on:", devices)

TEXT = "Nora lives in Naples. The fox chased the dog out of the kennel."
resid = nla_lens.extract(nla.spec.source_model, [TEXT], layer=nla.spec.layer, remote=REMOTE)[0][1:]
explained = nla.explain(resid, progress=False)
print(len(explained), "vectors explained there; the last:", explained[-1].text)

# %% [markdown]
# ## 2 What travels
#
# ### Exercise 3.1: the whole residual stream
#
# > Difficulty 1 of 5 · importance 4 of 5 · 5 minutes
#
# Llama-3.3-70B has 80 blocks and d_model 8192; bfloat16 takes two bytes a number. How much is the residual stream of a prompt of 1,000 tokens,
# behind every block? And how much is what an NLA needs?


# %% tags=["solution"]
def n_bytes(n_tokens, n_blocks, d_model, bytes_per_number=2):
    """Bytes of the residual stream behind so many blocks, at so many tokens."""
    # SOLUTION: one number for each token, block and dimension
    return n_tokens * n_blocks * d_model * bytes_per_number
    # END


# %% tags=["wrong"]
def n_bytes(n_tokens, n_blocks, d_model, bytes_per_number=2):
    return n_tokens * n_blocks * d_model


# %% tags=["test"]
@check("3.1")
def _():
    everything, one = n_bytes(1000, 80, 8192), n_bytes(1, 1, 8192)
    assert everything == 1_310_720_000, f"1,310,720,000 bytes, found {everything:,}"
    assert one == 16_384, f"one token behind one block: 16,384 bytes, found {one:,}"
    assert n_bytes(3, 2, 5, 4) == 120, "float32 has four bytes a number"
    print(f"all of it: {everything / 1e9:.2f} GB; one token behind block K: {one / 1e3:.1f} kB")


# %% [markdown]
# So positions are picked **on the server**, and only `[n, d]` comes back. The other way, into the AV, many vectors share a request.
#
# ### Exercise 3.2: what a vector costs
#
# > Difficulty 2 of 5 · importance 3 of 5 · 10 minutes
#
# The engine counts what it sends. With large batches the fixed part of a request (the code of the trace, the prompt) is shared. Measure both.


# %% tags=["solution"]
def bytes_per_vector(nla, vectors, batch_size):
    """Bytes that the verbalizer's engine sends for each vector.

    Args:
        nla: Its `verbalizer.engine.server.traffic.sent` goes up with what is sent.
        vectors: [n, d].
        batch_size: Most vectors in a request.

    Returns:
        A float.
    """
    # SOLUTION: read traffic.sent before and after explain(..., batch_size=batch_size); per vector
    traffic = nla.verbalizer.engine.server.traffic
    before = traffic.sent
    nla.explain(vectors, batch_size=batch_size, score=False, progress=False)
    return (traffic.sent - before) / len(vectors)
    # END


# %% tags=["wrong"]
def bytes_per_vector(nla, vectors, batch_size):
    nla.explain(vectors, batch_size=batch_size, score=False, progress=False)
    return nla.verbalizer.engine.server.traffic.sent / len(vectors)


# %% tags=["test"]
@check("3.2")
def _():
    few = resid[:6].as_ordinary()
    alone, together = (bytes_per_vector(nla, few, size) for size in (1, 6))
    again = bytes_per_vector(nla, few, 6)
    assert abs(again - together) < 0.02 * together, f"measured twice: {together:.0f}, {again:.0f}"
    assert together < 0.5 * alone, f"together they cost less: {alone:.0f} alone, {together:.0f}"
    print(
        f"six requests of one vector cost about {alone / together:.0f} times as much as one of six"
    )


# %% [markdown] tags=["hint"]
# `traffic.sent` never goes back to 0: take the difference of two readings.

# %% [markdown]
# ## 3 Is it the same?
#
# ### Exercise 3.3: token by token, and the control
#
# > Difficulty 2 of 5 · importance 5 of 5 · 15 minutes
#
# Compare **token ids**, not texts: two texts may look alike. And a comparison that also succeeds for the wrong vectors has shown nothing. (In float32 they
# must be equal. In bfloat16, as large models are served, a batch and a single row may differ by rounding.)


# %% tags=["solution"]
def same(there, here):
    """The share of explanations with equal token ids, and the same with the wrong partners.

    Args:
        there: n explanations, each with `.token_ids`.
        here: n explanations of the same vectors.

    Returns:
        The share equal; the share equal with `here` handed on by one.
    """
    # SOLUTION: compare the token ids pair by pair; then with here moved on by one

    def share(others):
        pairs = zip(there, others, strict=True)
        return sum(list(a.token_ids) == list(b.token_ids) for a, b in pairs) / len(there)

    here = list(here)
    return share(here), share([*here[1:], here[0]])
    # END


# %% tags=["wrong"]
def same(there, here):
    return float(len(there) == len(here)), 0.0


# %% tags=["test"]
class Fake:
    """An explanation, for the test."""

    def __init__(self, *token_ids):
        self.token_ids = token_ids


@check("3.3")
def _():
    found = same([Fake(1), Fake(2), Fake(5)], [Fake(1), Fake(2), Fake(2)])
    assert found == (2 / 3, 1 / 3), f"two of three are equal, handed on one of three: {found}"
    if ENGINE != "ndif:local":
        return
    local = nla_lens.NLA.from_pretrained(PAIR).explain(resid, progress=False)
    equal, control = same(list(explained.flat), list(local.flat))
    print(f"equal token by token: {equal:.0%} of {len(local)}; handed on by one: {control:.0%}")
    assert (equal, control) == (1, 0)


# %% [markdown] tags=["hint"]
# `[*here[1:], here[0]]` hands each one on.

# %% [markdown]
# The halves need not live together: `engine={"av": "ndif", "ar": "transformers"}` keeps the AR here, and `"ndif:http://HOST:PORT"` names a server of your own.
#
# ## 4 When it fails
#
# Every failure is an `NLARemoteError` that says what to do: no key, a model that is not deployed, versions that differ, a process that died, a server that is
# silent. Nothing that may have been paid for is sent twice by itself.

# %%
away = nla_lens.NLA.from_pretrained("tiny", engine="ndif:http://127.0.0.1:9")
away.verbalizer.engine.server.patience.connect = 0.5
try:
    away.explain(resid[-1])
except nla_lens.NLARemoteError as error:
    print(f"{error.cause}: {str(error).split(':')[0]}")

# %% [markdown]
# ### Exercise 3.4: go on where it stopped
#
# > Difficulty 3 of 5 · importance 5 of 5 · 20 minutes
#
# What was finished before the error is in `error.explanations`, in order. Write a loop that loses nothing and sends nothing twice, and that gives up when
# a try brings nothing new: a server that answers no single vector must not be asked for ever.


# %% tags=["solution"]
def explain_all(explain, vectors):
    """Explanations of all vectors, however often the server fails on the way.

    Args:
        explain: `explain(vectors)` -> a list; or raises an NLARemoteError whose `explanations` are
            those of the first vectors.
        vectors: [n, d].

    Returns:
        A list of n.

    Raises:
        NLARemoteError: A try that finished nothing.
    """
    # SOLUTION: explain what is left; on an error keep error.explanations and go on behind them
    found = []
    while len(found) < len(vectors):
        try:
            found.extend(explain(vectors[len(found) :]))
        except nla_lens.NLARemoteError as error:
            finished = list(error.explanations or ())
            if not finished:
                raise
            found.extend(finished)
    return found
    # END


# %% tags=["wrong"]
def explain_all(explain, vectors):
    for _ in range(10):
        try:
            return explain(vectors)
        except nla_lens.NLARemoteError:
            continue
    return []


# %% tags=["test"]
class Flaky:
    """A server that dies after so many vectors, and counts what it was asked for."""

    def __init__(self, *lives):
        self.lives, self.asked = list(lives), 0

    def __call__(self, vectors):
        n = self.lives.pop(0) if self.lives else len(vectors)
        self.asked += min(n, len(vectors))
        finished = [float(v[0]) for v in vectors[:n]]
        if n >= len(vectors):
            return finished
        error = nla_lens.NLARemoteError("the server died", cause="died")
        error.explanations = finished
        raise error


@check("3.4")
def _():
    vectors = torch.arange(10.0)[:, None]
    server = Flaky(3, 1, 4)
    found = explain_all(server, vectors)
    assert found == list(range(10)), f"all ten, in order: {found}"
    assert server.asked == 10, f"ten vectors were paid for, found {server.asked}"
    assert explain_all(Flaky(), vectors[:0]) == [], "nothing to do is nothing done"
    try:
        explain_all(Flaky(2, 0, 0, 0, 0), vectors)
    except nla_lens.NLARemoteError:
        print("died three times: 10 of 10 explained, each sent once; dead for good: given up")
    else:
        raise AssertionError("a server that finishes nothing must be given up")


# %% [markdown] tags=["hint"]
# `found` grows; what is left is `vectors[len(found):]`. When does a try bring nothing new?

# %% [markdown]
# ## What to take with you
#
# * Estimate first: what is picked on the server does not travel.
# * Compare token ids, with a control.
# * Before a long run: `nla-lens doctor --engine ndif kitft/Llama-3.3-70B-NLA-L53` looks at the server, the key, the three models and the versions on both
#   sides, and sends no job.
# * `nla.verbalizer.engine.server` has `patience` (how long to wait without a word) and `traffic`.
