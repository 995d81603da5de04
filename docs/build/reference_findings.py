"""What a reference study found, in sentences made from its numbers, and what that says of others' claims."""

import reference_precision
from reference_numbers import NAMES, best_trial, mean, signed

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "not decided"
MAIN = ("qlora", "galore", "hybrid")


def findings(found):
    """[sentence, ...]: scores, memory, speed, forgetting, fp16 and the hybrid, of a summary."""
    return [
        *_against_base(found),
        *_best(found),
        *_losses(found),
        *_rates(found),
        *_memory(found),
        *_speed(found),
        *_forgetting(found),
        *reference_precision.sentences(found),
        *_hybrid(found),
    ]


def claims(found):
    """[(claim, verdict, why), ...] of the original study's claims, decided by intervals alone."""
    return [
        ("If RAM is low, use QLoRA", *_low_memory(found)),
        ("GaLore might learn better", *_learns_better(found)),
        ("The hybrid keeps general knowledge", *_keeps_knowledge(found)),
    ]


def pair_of(found, metric, method, other):
    """{'value', 'low', 'high', 'is_noise'} of score(method) - score(other), or None."""
    for pair in found["pairs"]:
        if pair["metric"] == metric and {pair["method"], pair["other"]} == {method, other}:
            low, high, value = pair["low"], pair["high"], pair["difference"]
            if pair["method"] != method:
                low, high, value = -high, -low, -value
            return {"value": value, "low": low, "high": high, "is_noise": low <= 0.0 <= high}
    return None


def loss_gap(found, what, method, other):
    """The same of a loss, over seeds."""
    for gap in found["losses"]:
        if gap["what"] == what and {gap["method"], gap["other"]} == {method, other}:
            if gap["method"] == method:
                return gap
            return {**gap, "value": -gap["value"], "low": -gap["high"], "high": -gap["low"]}
    return None


def _trained(found):
    return [method for method in found["methods"] if method != "base"]


def _scored(found):
    return [method for method in _trained(found) if found["methods"][method]["scores"]]


def _against_base(found):
    known = {m: found["methods"][m]["over_base"] for m in _scored(found) if found["methods"][m]["over_base"]}
    if not known:
        return
    for metric, name in NAMES.items():
        clear = [m for m in known if not known[m][metric]["is_noise"] and known[m][metric]["value"] > 0]
        rest = [m for m in known if m not in clear]
        how = "All methods gained" if not rest else f"{_listed(clear) or 'No method'} gained"
        tail = f"; {_listed(rest)} did not measurably" if rest and clear else ""
        base, *scores = (found["methods"][m]["scores"][metric]["value"] for m in ("base", *known))
        (low, worst), (high, best) = min(zip(scores, known)), max(zip(scores, known))
        spread = f"between {low:.3f} ({worst}) and {high:.3f} ({best})" if len(known) > 1 else f"{low:.3f}"
        yield f"{how} in {name} over the untrained model{tail}: from {base:.3f} to {spread}."
    cut = {m: found["methods"][m]["over_base_cut"]["rougeL"] for m in known if found["methods"][m]["over_base_cut"]}
    clear = [m for m in cut if not cut[m]["is_noise"] and cut[m]["value"] > 0]
    if cut:
        last = min(clear, key=lambda m: cut[m]["value"], default=None)
        least = f"; the least gain is {last}'s with {signed(cut[last])}" if last else ""
        who = "all methods" if len(clear) == len(cut) else _listed(clear) or "no method"
        yield (
            f"Against the untrained answers cut at {found['cut_at_words']} words, the median reference length, {who} still "
            "gained in ROUGE-L, so that "
            f"{'the gain is more than knowing when to stop' if clear else 'gains may be no more than knowing when to stop'}"
            f"{least}."
        )


def _best(found):
    methods = _scored(found)
    for metric, name in NAMES.items():
        order = sorted(methods, key=lambda m: -found["methods"][m]["scores"][metric]["value"])
        if len(order) < 2:
            return
        first = order[0]
        gaps = {other: pair_of(found, metric, first, other) for other in order[1:]}
        beaten = [other for other, gap in gaps.items() if gap and not gap["is_noise"]]
        level = [other for other, gap in gaps.items() if gap and gap["is_noise"]]
        said = [f"beyond the noise above {_listed(beaten)}"] if beaten else []
        said += [f"not measurably above {_listed(level)}"] if level else []
        yield f"Highest {name}: {first} with {found['methods'][first]['scores'][metric]['value']:.3f}, {', '.join(said)}."


def _losses(found):
    known = {m: mean(found["methods"][m]["eval_loss"]) for m in _trained(found)}
    order = sorted((m for m in known if known[m] is not None), key=known.get)
    if len(order) > 1:
        told = ", ".join(f"{m} {known[m]:.3f}" for m in order)
        yield f"Least loss on the test rows, nats per token, where each of the reference's tokens counts: {told}."


def _rates(found):
    at_edge, steps = {"largest": [], "smallest": []}, set()
    for method in _trained(found):
        basis = (found["methods"][method]["sweep"] or {}).get("from")
        if basis and basis.get("is_at_edge"):
            is_largest = best_trial(basis)["factor"] == max(trial["factor"] for trial in basis["tried"])
            at_edge["largest" if is_largest else "smallest"].append(method)
            steps.add(basis["steps"])
    told = [f"the {which} tried for {_listed(methods)}" for which, methods in at_edge.items() if methods]
    if told:
        yield (
            f"Learning rates: the best of the sweep ({_listed([str(n) for n in sorted(steps)])} of "
            f"{max(found['steps']):,} steps, one seed) was {' and '.join(told)}, so rates beyond might do better still, and "
            "methods that lie close together are ordered at these rates alone."
        )
    both = [
        m for m in _trained(found) if found["methods"][m]["sweep"] and len(found["methods"][m]["sweep"]["rates"]) > 1
    ]
    if both:
        yield (
            f"The two rates of {_listed(both)} were scaled together: the pair that each part prefers alone was not tried, so "
            "it may do better than here."
        )


def _memory(found):
    yield from _ranked(
        found,
        "peak_memory_gib",
        "Least peak GPU memory in training, as allocated under the plan that ran",
        "GiB",
        least=True,
        form="{:.2f}",
    )


def _speed(found):
    many = found["side_by_side"]
    note = f", roughly, as {many} runs shared each GPU" if many > 1 else ""
    what = f"Fastest training, median over steps with compiling apart{note}"
    yield from _ranked(found, "median_tokens_per_second", what, "tokens/s", least=False, form="{:,.0f}")


def _ranked(found, field, what, unit, *, least, form):
    known = {m: mean(found["methods"][m][field]) for m in _trained(found)}
    known = {m: value for m, value in known.items() if value is not None}
    if len(known) > 1:
        order = sorted(known, key=lambda m: known[m] if least else -known[m])
        rest = ", ".join(f"{m} {form.format(known[m])}" for m in order[1:])
        yield f"{what}: {order[0]} with {form.format(known[order[0]])} {unit}; {rest}."


def _forgetting(found):
    gaps = {m: loss_gap(found, "general_loss", m, "base") for m in _trained(found)}
    gaps = {m: gap for m, gap in gaps.items() if gap}
    if gaps:
        more = [m for m in gaps if not gaps[m]["is_noise"] and gaps[m]["value"] > 0]
        less = [m for m in gaps if not gaps[m]["is_noise"] and gaps[m]["value"] < 0]
        told = ", ".join(f"{m} {signed(gaps[m])}" for m in gaps)
        yield (
            "Forgetting, as the rise of the loss on one general text over the untrained model's, intervals over seeds, not over "
            f"texts: {told}. "
            f"It rose measurably with {'all of them' if len(more) == len(gaps) else _listed(more) or 'none'}"
            + (f" and fell with {_listed(less)}." if less else ".")
        )
    rounded = _rounding(found)
    if rounded and gaps:
        rises = {m: mean(_general(found, m)) - _base_general(found) for m in rounded}
        told = ", ".join(f"{m} {gap:+z.3f} of {rises[m]:+z.3f}" for m, gap in rounded.items())
        left = " and ".join(f"{rises[m] - gap:+z.3f} for {m}" for m, gap in rounded.items())
        yield (
            "Holding the untrained model in a method's 4 bits, without any training, changes that loss as well: "
            f"{told}. That much is there before training, which changes it by {left} more; a model that is served in 4 bits "
            "pays all of it. The parts need not add up, for training can repair what rounding did."
        )


def _base_general(found):
    return mean(_general(found, "base")) if "base" in found["methods"] else None


def _general(found, method):
    return found["methods"][method]["general_loss"]


def _rounding(found):
    """{method: rise of the untrained model's loss on general text by the method's 4 bits alone}."""
    base = _base_general(found)
    known = {m: found["methods"][m].get("general_loss_nf4") for m in _trained(found)}
    if base is None:
        return {}
    return {m: loss - base for m, loss in known.items() if loss is not None and mean(_general(found, m)) is not None}


def _hybrid(found):
    known = found["methods"]
    if any(method not in known or not known[method]["scores"] for method in MAIN):
        return
    parts = []
    for other in ("qlora", "galore"):
        gap = pair_of(found, "rougeL", "hybrid", other)
        memory = [mean(known[m]["peak_memory_gib"]) for m in ("hybrid", other)]
        said = f"against {other} ROUGE-L {signed(gap)}{', inside the noise' if gap['is_noise'] else ''}"
        loss = loss_gap(found, "eval_loss", "hybrid", other)
        said += f", test loss {signed(loss)}" if loss else ""
        parts.append(said if None in memory else f"{said}, memory {memory[0] - memory[1]:+z.2f} GiB")
    yield f"What the hybrid buys: {'; '.join(parts)}."


def _low_memory(found):
    known = {m: found["methods"][m]["peak_memory_gib"] for m in MAIN if m in found["methods"]}
    if "qlora" not in known or len(known) < 2 or any(None in values for values in known.values()):
        return UNDECIDED, "memory of too few methods is known"
    others = {m: min(values) for m, values in known.items() if m != "qlora"}
    is_least = max(known["qlora"]) < min(others.values())
    plain = mean(found["methods"].get("lora", {}).get("peak_memory_gib"))
    others_too = {**{m: mean(known[m]) for m in others}, **({} if plain is None else {"lora": plain})}
    why = f"peak of qlora {mean(known['qlora']):.2f} GiB, " + ", ".join(f"{m} {v:.2f}" for m, v in others_too.items())
    gain = (found["methods"]["qlora"]["over_base"] or {}).get("rougeL")
    if not is_least:
        return NOT_SUPPORTED, f"{why}: it is not the least"
    if gain is None or gain["is_noise"]:
        return UNDECIDED, f"{why}; whether it learns anything is inside the noise"
    if gain["value"] < 0:
        return NOT_SUPPORTED, f"{why}, but it scores below the untrained model ({signed(gain)})"
    return SUPPORTED, f"{why}, and it gains over the untrained model (ROUGE-L {signed(gain)})"


def _learns_better(found):
    gaps = {metric: pair_of(found, metric, "galore", "qlora") for metric in NAMES}
    if None in gaps.values():
        return UNDECIDED, "galore and qlora are not both scored"
    why = "galore less qlora: " + ", ".join(f"{NAMES[metric]} {signed(gap)}" for metric, gap in gaps.items())
    loss = loss_gap(found, "eval_loss", "galore", "qlora")
    why += f", test loss {signed(loss)}" if loss else ""
    plain = pair_of(found, "rougeL", "galore", "lora")
    if plain:
        loss = loss_gap(found, "eval_loss", "galore", "lora")
        why += f"; less lora, which holds nothing in 4 bits: ROUGE-L {signed(plain)}"
        why += f", test loss {signed(loss)}" if loss else ""
    return _decided([gap["value"] for gap in gaps.values() if not gap["is_noise"]], len(gaps)), why


def _decided(clear, count):
    """Supported where all differences are surely above 0, not supported where one is surely below."""
    if any(value < 0 for value in clear):
        return NOT_SUPPORTED
    return SUPPORTED if len(clear) == count else UNDECIDED


def _keeps_knowledge(found):
    gaps = {other: loss_gap(found, "general_loss", "hybrid", other) for other in ("qlora", "galore")}
    gaps = {other: gap for other, gap in gaps.items() if gap}
    if len(gaps) < 2:
        return UNDECIDED, "the loss on general text of too few methods or seeds is known"
    why = "loss on general text, hybrid less " + ", less ".join(f"{other} {signed(gap)}" for other, gap in gaps.items())
    base = loss_gap(found, "general_loss", "hybrid", "base")
    why += f"; less the untrained model's {signed(base)}" if base else ""
    rounded = _rounding(found)
    if rounded:
        why += "; by 4 bits alone, untrained: " + ", ".join(f"{m} {gap:+z.3f}" for m, gap in rounded.items())
    return _decided([-gap["value"] for gap in gaps.values() if not gap["is_noise"]], len(gaps)), why


def _listed(names):
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)
