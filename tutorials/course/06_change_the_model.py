# requires: transformer-lens>=2.18
# %% [markdown]
# # 6 · Change the explanation, change the model
#
# **Claim.** Whoever edits an explanation of the embedded pair `tiny` changes what the model says next, toward the edit. Evidence: six edits of the
# topic at two prompts, pushed by the residual's own length: the log odds of the new topic's words against the old one's rise by 17.7 on
# average, by 13.0 at least. Control: the words of the edited text in random order, 5.4; random directions, 1.5, the best of eight 4.4.
#
# A reading that merely correlates with the text would not do that. The pair was made to be legible (`tiny_nla/MODEL_CARD.md`): this shows
# how the test is done, not that it comes out this way on natural models.
#
# **You will** turn an edit into a direction, add it to a running model, write the metric that says whether the model moved *toward the
# edit*, and the controls without which that means nothing.
#
# **You need** notebook 1, and to have used a hook in TransformerLens once.
#
# | section | minutes |
# |---|---|
# | 1 From an edit to a direction | 15 |
# | 2 Into the model | 20 |
# | 3 Did it move toward the edit? | 30 |
# | 4 How much is enough? | 20 |

# %%
import random

import torch
from course_tools import boot, check

import nla_lens

PAIR = "tiny"  # A released pair: "kitft/nla-qwen2.5-7b-L20" (its three models need about 45 GB)

# %%
nla = nla_lens.NLA.from_pretrained(PAIR)
model = boot(nla.spec.source_model)
K, HOOK = nla.spec.layer, nla.spec.hook_name
PROMPT = "The doctor gave the"


def likeliest(probs, k=5):
    """The k likeliest next tokens."""
    top = probs.topk(k)
    ids = top.indices.tolist()
    return "  ".join(
        f"{model.tokenizer.decode([i])} {p:.2f}" for i, p in zip(ids, top.values, strict=True)
    )


plain = model(PROMPT)[0, -1].softmax(-1)
explanation = nla.explain_text(PROMPT, positions=[-1])[0]
print(explanation.text)
print("the model goes on:", likeliest(plain))

# %% [markdown]
# ## 1 From an edit to a direction
#
# The reconstructor turns any text into a vector, an edited one too. The **difference** of the two is what the edit means as a direction. What
# both texts share, right or wrong, falls out.
#
# ### Exercise 6.1: the direction of an edit
#
# > Difficulty 1 of 5 · importance 5 of 5 · 5 minutes


# %% tags=["solution"]
def direction_of(text, old, new, reconstruct):
    """What replacing a word by another means as a direction, of length 1.

    Args:
        text: The explanation's text.
        old: A word in it.
        new: What stands there instead.
        reconstruct: `reconstruct(texts)` -> [n, d].

    Raises:
        ValueError: `old` is not in the text: the edit would change nothing.
    """
    # SOLUTION: refuse an edit that changes nothing; AR(edited) - AR(text), scaled to norm 1
    if old not in text:
        raise ValueError(f"{old!r} is not in {text!r}")
    before, after = reconstruct([text, text.replace(old, new)])
    return (after - before) / (after - before).norm()
    # END


# %% tags=["wrong"]
def direction_of(text, old, new, reconstruct):
    (after,) = reconstruct([text.replace(old, new)])
    return after / after.norm()


# %% tags=["test"]
@check("6.1")
def _():
    edited = explanation.text.replace("medicine", "school")
    library = nla.steering_vector(explanation, edited).as_ordinary()
    mine = direction_of(explanation.text, "medicine", "school", nla.reconstruct)
    cos = torch.cosine_similarity(mine, library, dim=0).item()
    assert cos > 0.9999, f"its cosine to nla.steering_vector is {cos:.2f}"
    assert abs(mine.norm().item() - 1) < 1e-4, f"its length is {mine.norm():.2f}"
    try:
        direction_of("no such word here", "medicine", "school", nla.reconstruct)
    except ValueError:
        print("cosine to nla.steering_vector: 1.00")
    else:
        raise AssertionError("an edit that changes nothing has no direction")


# %% [markdown] tags=["hint"]
# Reconstruct both texts in one call. Check first whether `old` is there.

# %% [markdown]
# ## 2 Into the model
#
# ### Exercise 6.2: steer
#
# > Difficulty 3 of 5 · importance 5 of 5 · 15 minutes
#
# How long should the added vector be? "8" says nothing: in one model the residual has norm 13, in another 80,000. So count in **units of the
# residual's own norm** at that place: `h + strength * ||h|| * direction`. Strength 1 is a push as long as the residual itself.


# %% tags=["solution"]
def steering(direction, strength):
    """A hook for TransformerLens that pushes the last position.

    Args:
        direction: [d], of length 1.
        strength: In units of the residual's norm there.

    Returns:
        A function `hook(resid, hook)`, resid [batch, pos, d], that returns a changed copy.
    """

    def hook(resid, hook):
        # SOLUTION: in a copy, add strength times the norm of the last position times the direction
        changed = resid.clone()
        last = resid[:, -1]
        changed[:, -1] = last + strength * last.norm(dim=-1, keepdim=True) * direction
        return changed
        # END

    return hook


# %% tags=["wrong"]
def steering(direction, strength):
    def hook(resid, hook):
        changed = resid.clone()
        changed[:, -1] += strength * direction
        return changed

    return hook


# %% tags=["wrong"]
def steering(direction, strength):
    def hook(resid, hook):
        return resid + strength * resid.norm(dim=-1, keepdim=True) * direction

    return hook


# %% tags=["test"]
def edited(text, old, new):
    """The direction of an edit, by the library."""
    found = nla.steering_vector(text, text.replace(old, new)).as_ordinary()
    return found / found.norm()


@check("6.2")
def _():
    direction = edited(explanation.text, "medicine", "school")
    toy = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    pushed = steering(torch.tensor([1.0, 0.0]), 2.0)(toy.clone(), None)
    right = torch.tensor([[[3.0, 4.0], [4.0, 2.0]]])
    assert torch.allclose(pushed, right), f"{pushed.tolist()} instead of {right.tolist()}"
    hooks = [(HOOK, steering(direction, 1.0))]
    mine = model.run_with_hooks(PROMPT, fwd_hooks=hooks)[0, -1].softmax(-1)
    with nla_lens.steer(model, direction, strength=1.0, layer=K):
        library = model(PROMPT)[0, -1].softmax(-1)
    apart = (mine - library).abs().max().item()
    assert apart < 1e-5, f"a probability differs from nla_lens.steer's by {apart:.4f}"
    print("plain:  ", likeliest(plain))
    print("steered:", likeliest(mine))


# %% [markdown] tags=["hint"]
# `resid[:, -1]` is [batch, d]. Keep the last axis when you take its norm (`keepdim=True`).

# %% [markdown]
# ## 3 Did it move toward the edit?
#
# *Something* changed. Any push changes something. What is wanted is a number for "toward school", decided before looking.
#
# ### Exercise 6.3: the metric
#
# > Difficulty 2 of 5 · importance 5 of 5 · 10 minutes
#
# Choose the words of both topics beforehand, and compare how the odds between them moved, in log odds: log(mass of the new topic / mass of the
# old one), after less before. Only what goes from one to the other counts; where the model merely falls apart, both lose.


# %% tags=["solution"]
def moved(before, after, old_ids, new_ids):
    """How far the log odds of the new words against the old ones rose.

    Args:
        before: [vocabulary], probabilities.
        after: [vocabulary].
        old_ids: Token ids of words of the old topic.
        new_ids: Of the new topic.

    Returns:
        A float; 0 where nothing moved.
    """
    # SOLUTION: log of the summed new mass over the summed old mass, after less before

    def log_odds(probs):
        return (probs[new_ids].sum() / probs[old_ids].sum()).log().item()

    return log_odds(after) - log_odds(before)
    # END


# %% tags=["wrong"]
def moved(before, after, old_ids, new_ids):
    return (after[new_ids].sum() - before[new_ids].sum()).item()


# %% tags=["test"]
sys.path.insert(0, str(TUTORIALS / "tiny_nla"))
import lexicon


def words_of(topic):
    """Token ids of a topic's words that no other topic has, each one token with a space before."""
    own = {w for group in lexicon.GROUPS[topic].values() for w in group}
    rest = {w for t, g in lexicon.GROUPS.items() if t != topic for ws in g.values() for w in ws}
    ids = [model.tokenizer.encode(f" {w}", add_special_tokens=False) for w in sorted(own - rest)]
    return torch.tensor([i[0] for i in ids if len(i) == 1])


@check("6.3")
def _():
    before = torch.tensor([0.6, 0.2, 0.1, 0.1])
    after = torch.tensor([0.2, 0.2, 0.5, 0.1])
    found = moved(before, after, torch.tensor([0]), torch.tensor([2, 3]))
    assert abs(found - 2.197225) < 1e-4, f"odds 1/3 become 3: log 9 = 2.20, found {found:.2f}"
    assert moved(before, before, [0], [1]) == 0, "nothing moved"
    flat = torch.full((4,), 0.25)
    assert moved(flat, flat * 0.1, [0], [1]) < 1e-6, "both lose alike: nothing moved"
    with nla_lens.steer(model, edited(explanation.text, "medicine", "school"), layer=K):
        steered = model(PROMPT)[0, -1].softmax(-1)
    ids = words_of("medicine"), words_of("school")
    masses = [[p[i].sum().item() for i in ids] for p in (plain, steered)]
    print("medicine, school: {:.2f}, {:.2f} before".format(*masses[0]), end="; ")
    print("{:.2f}, {:.2f} after".format(*masses[1]))
    print(f"log odds moved by {moved(plain, steered, *ids):.1f}")


# %% [markdown] tags=["hint"]
# `probs[ids].sum()` is the mass. A ratio of masses does not care about what happens to all other words.

# %% [markdown]
# ### Exercise 6.4: the controls
#
# > Difficulty 3 of 5 · importance 5 of 5 · 20 minutes
#
# * A **random** direction of the same length: is it the push, or where it goes? Take out of it what it has in common with the true one.
# * A **meaningless edit**: the edited explanation's words in random order. The same words, without what they say.


# %% tags=["solution"]
def random_direction(direction, seed):
    """A direction of length 1 at right angles to the given one.

    Args:
        direction: [d], of length 1.
        seed: Another seed, another direction.
    """
    generator = torch.Generator().manual_seed(seed)
    # SOLUTION: draw from the normal distribution, subtract the part along direction, scale to 1
    drawn = torch.randn(direction.shape, generator=generator)
    drawn = drawn - (drawn @ direction) * direction
    return drawn / drawn.norm()
    # END


def shuffled(text, seed):
    """A text's words in random order."""
    # SOLUTION: split, shuffle with random.Random(seed), join
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)
    # END


# %% tags=["wrong"]
def random_direction(direction, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(direction.shape, generator=generator)
    return drawn / drawn.norm()


def shuffled(text, seed):
    return text


# %% tags=["test"]
EDITS = [
    ("The doctor gave the", "medicine", "school"),
    ("The doctor gave the", "medicine", "money"),
    ("The chef chopped the", "cooking", "music"),
    ("The chef chopped the", "cooking", "animals"),
    ("The doctor gave the", "medicine", "sport"),
    ("The chef chopped the", "cooking", "school"),
]


def steered_odds(prompt, old, new, directions, strength=1.0):
    """How far the log odds move with each direction."""
    ids = words_of(old), words_of(new)

    def log_odds():
        probs = model(prompt)[0, -1].softmax(-1)
        return (probs[ids[1]].sum() / probs[ids[0]].sum()).log().item()

    before, found = log_odds(), []
    for direction in directions:
        with nla_lens.steer(model, direction, strength=strength, layer=K):
            found.append(log_odds() - before)
    return found


@check("6.4")
def _():
    true = edited(explanation.text, "medicine", "school")
    drawn = [random_direction(true, seed) for seed in range(3)]
    for d in drawn:
        assert abs(d.norm().item() - 1) < 1e-4, f"its length is {d.norm():.2f}"
        assert abs((d @ true).item()) < 1e-4, f"its cosine to the true one is {d @ true:.2f}"
    assert abs((drawn[0] @ drawn[1]).item()) < 0.5, "another seed, another direction"
    mixed = shuffled("a b c d e f g h", 0)
    assert mixed != "a b c d e f g h" and sorted(mixed.split()) == list("abcdefgh"), mixed
    results = []
    for prompt, old, new in EDITS:
        text = nla.explain_text(prompt, positions=[-1])[0].text
        assert old in text, (prompt, text)
        true = edited(text, old, new)
        noise = nla.steering_vector(text, shuffled(text.replace(old, new), 1)).as_ordinary()
        directions = [true, noise, *(random_direction(true, seed) for seed in range(4))]
        edit, mixed, *drawn = steered_odds(prompt, old, new, directions)
        results.append([edit, mixed, sum(drawn) / len(drawn)])
        print(f"{old:9} -> {new:8} edit {edit:5.1f}   words shuffled {mixed:5.1f}   "
              f"random {results[-1][2]:5.1f}")  # fmt: skip
    means = torch.tensor(results).mean(0).tolist()
    print("mean: edit {:.1f}, words shuffled {:.1f}, random {:.1f}".format(*means))


# %% [markdown] tags=["hint"]
# `drawn - (drawn @ direction) * direction` takes out what two directions have in common.

# %% [markdown]
# Shuffled words still hold the new topic's word, so that a part of the effect is to be expected. How large is that part in your results? What the
# sentence adds is the difference.

# %% [markdown]
# ## 4 How much is enough?
#
# ### Exercise 6.5: the smallest strength
#
# > Difficulty 2 of 5 · importance 3 of 5 · 15 minutes
#
# A push that needs three times the residual's length says little: the model is then somewhere it has never been. Find the smallest strength at
# which the new topic overtakes the old one.


# %% tags=["solution"]
def smallest(strengths, odds):
    """The smallest strength with which the new topic is likelier than the old one.

    Args:
        strengths: In any order.
        odds: `odds(strength)` -> log odds of the new topic against the old one, steered with it.

    Returns:
        The strength, or None if there is none among them.
    """
    # SOLUTION: try them in rising order, return the first with odds above 0
    return next((s for s in sorted(strengths) if odds(s) > 0), None)
    # END


# %% tags=["wrong"]
def smallest(strengths, odds):
    return min(strengths, key=lambda s: abs(odds(s)))


# %% tags=["test"]
@check("6.5")
def _():
    assert smallest([2, 0.5, 1], lambda s: s - 0.8) == 1, "of 0.5, 1 and 2 the first above 0.8 is 1"
    assert smallest([1, 2], lambda s: -1.0) is None, "if it never overtakes, there is none"
    strengths = [0.1, 0.2, 0.3, 0.5, 1.0, 2.0]
    for prompt, old, new in EDITS:
        ids = words_of(old), words_of(new)
        text = nla.explain_text(prompt, positions=[-1])[0].text
        true = edited(text, old, new)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(true.shape, generator=generator)

        def odds(strength, direction, prompt=prompt, ids=ids):
            with nla_lens.steer(model, direction, strength=strength, layer=K):
                probs = model(prompt)[0, -1].softmax(-1)
            return (probs[ids[1]].sum() / probs[ids[0]].sum()).log().item()

        found = smallest(strengths, lambda s, d=true: odds(s, d))
        chance = smallest(strengths, lambda s, d=drawn: odds(s, d))
        print(f"{old:9} -> {new:8} edit {found}, random {chance}")


# %% [markdown] tags=["hint"]
# Sort first. Python's `next(..., None)` takes the first that fits.

# %% [markdown]
# ## The same in two calls
#
# `nla_lens.sweep` runs an edit at several strengths beside both controls, and says what the steered residual holds; `nla_lens.compare` says
# what tells two residuals apart.

# %%
edit = explanation.text, explanation.text.replace("medicine", "school")
swept = nla_lens.sweep(model, PROMPT, edit, [0.5, 1.0], nla=nla, toward=" maths", max_new_tokens=4)
for row in swept.rows:
    print(
        f"{row.direction:17} {row.strength:3} P(maths) {row.toward:.3f} KL {row.kl:5.2f} {row.text!r}"
    )

# %%
difference = nla_lens.compare(nla, "Nora lives in Naples.", "Nora lives in Oslo.")
for sentence in difference.sentences[:2]:
    print(f"{sentence.side}: {sentence.text} (missed by a {sentence.a:.2f}, by b {sentence.b:.2f})")

# %% [markdown]
# The claim at the top, over all six edits:

# %%
odds = []
for prompt, old, new in EDITS:
    text = nla.explain_text(prompt, positions=[-1])[0].text
    true = edited(text, old, new)
    drawn = torch.randn(8, len(true), generator=torch.Generator().manual_seed(1))
    own, *rest = steered_odds(prompt, old, new, [true, *drawn])
    odds.append([own, max(rest)])
odds = torch.tensor(odds)
print(f"edit: {odds[:, 0].mean():.1f}, lowest {odds[:, 0].min():.1f};", end=" ")
print(f"best of 8 random directions: {odds[:, 1].mean():.1f}, highest {odds[:, 1].max():.1f}")
if PAIR == "tiny":
    assert (odds[:, 0] > odds[:, 1]).all() and odds[:, 0].min() > 1

# %% [markdown]
# ## What to take with you
#
# * An edit is a direction: `AR(edited) - AR(text)`.
# * Strength is counted in the residual's own norm.
# * Decide what counts as success before looking, as a ratio, and beside a random direction and a meaningless edit.
# * That the model follows the edit is evidence that it *uses* what the words name. It is no evidence that each word is right.
