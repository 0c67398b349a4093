"""What the numbers of `gist-dist inspect` say, as sentences. Weights are means over rows; see planning/inspect.py."""

from typing import Any

from gist_dist.common.text import listed, percent

WORTH = 0.05
"""Share of the negatives' weight from which on false negatives are worth a guide."""
EASY = 0.2
"""Mean probability of not finding the positive: below it a batch has little to teach."""
ENOUGH = 0.9
"""Share of the largest batch's hardness that a smaller one may do with."""

GOOD, UNCERTAIN, POOR, NOTHING = "worth it", "to be judged", "leaves much", "not needed"


def advise_source(source: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    verdict, why = judge_guide(source, recipe)
    sentences = [f"Guide {verdict}: {why}."]
    sentences += [s for s in (f(source, recipe) for f in (_temperature, _margin, _size, _mixing)) if s]
    return sentences


def advise(sources: list[dict[str, Any]], recipe: dict[str, Any]) -> list[str]:
    """On the recipe as a whole, most important first."""
    by_verdict: dict[str, list[str]] = {}
    for source in sources:
        by_verdict.setdefault(judge_guide(source, recipe)[0], []).append(source["name"])
    at = f"at temperature {recipe['temperature']:g}"
    meanings = {
        GOOD: f"The guide is worth it {at} for",
        POOR: f"The guide takes out too little {at} for",
        UNCERTAIN: "The guide masks much, and the data do not show whether rightly; read the examples of",
        NOTHING: f"False negatives carry less than {percent(WORTH)} of the gradient {at}, so that the guide changes "
        "little, for",
    }
    advice = [f"{meanings[v]} {listed(by_verdict[v])}." for v in meanings if v in by_verdict]
    if POOR in by_verdict:
        advice.append(
            "Where it takes out too little, raise loss.margin or loss.temperature, or use data.known_positives: "
            "known pairs and labels need no guide."
        )
    easy = [s["name"] for s in sources if weights_at(s, recipe)["hardness"] < EASY]
    if easy:
        remedy = "a larger batch or mined negatives (data.mine)"
        if recipe["mixing"] != "clustered":
            remedy = f"data.mixing=clustered, {remedy}"
        advice.append(f"Batches are easy for the untrained student in {listed(easy)}: {remedy} would make them harder.")
    return advice


def judge_guide(source: dict[str, Any], recipe: dict[str, Any]) -> tuple[str, str]:
    """One of the verdicts, and its reason."""
    weight = weights_at(source, recipe)
    known, left, masked = (weight[key] for key in ("known_weight", "known_weight_left", "masked_weight"))
    taken = f"it takes out {percent(masked)} of the negatives' weight"
    if known is not None and known >= WORTH:
        told = f"known false negatives carry {percent(known)} of the negatives' weight and the guide leaves "
        return (GOOD if left <= max(WORTH, known / 2) else POOR), told + percent(left)
    if masked >= WORTH and known is None:
        return UNCERTAIN, f"{taken}, and no labels or pairs tell of what"
    if masked >= WORTH:
        return UNCERTAIN, f"{taken}, and known false negatives carry {percent(known)}"
    return NOTHING, taken


def _temperature(source: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """The lowest temperatures at which false negatives stay below WORTH, with the guide and without."""
    size = size_at(source["sizes"], recipe)
    if source["truth"] is None or max(t["known_weight"] for t in size["temperatures"]) < WORTH:
        return None

    def lowest(key: str) -> str:
        fitting = [t["temperature"] for t in size["temperatures"] if t[key] <= WORTH]
        return f"{fitting[0]:g}" if fitting else f"above {size['temperatures'][-1]['temperature']:g}"

    return (
        f"Known false negatives keep at most {percent(WORTH)} of the weight down to temperature "
        f"{lowest('known_weight_left')} with the guide, {lowest('known_weight')} without."
    )


def _margin(source: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """With labels alone: what is not in a pair may be a false negative all the same."""
    if source["truth"] != "labels":
        return None

    def error(margin: dict[str, Any]) -> float:
        return margin["known_weight_left"] + margin["wrong_weight"]

    own = next(m for m in source["margins"] if m["margin"] == recipe["margin"])
    best = min(source["margins"], key=error)
    if error(best) > 0.9 * error(own):
        return None
    return (
        f"loss.margin={best['margin']:g} would leave {percent(best['known_weight_left'])} on false negatives and take "
        f"{percent(best['wrong_weight'])} from true ones, {own['margin']:g} leaves {percent(own['known_weight_left'])} "
        f"and takes {percent(own['wrong_weight'])}."
    )


def _size(source: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    hardness = {s["rows"]: _weights(s, recipe)["hardness"] for s in source["sizes"]}
    if len(hardness) < 2:
        return None
    largest = max(hardness)
    enough = min(size for size, value in hardness.items() if value >= ENOUGH * hardness[largest])
    return (
        f"Hardness is {hardness[min(hardness)]:.2f} with {min(hardness):,} rows and {hardness[largest]:.2f} with "
        f"{largest:,}; {enough:,} rows have at least {percent(ENOUGH)} of that."
    )


def _mixing(source: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    if not source.get("clustered"):
        return None
    same_size = next(size for size in source["sizes"] if size["rows"] == source["clustered"]["rows"])
    random, near = (_weights(size, recipe) for size in (same_size, source["clustered"]))
    told = f"Clustered batches of {same_size['rows']:,} rows have hardness {near['hardness']:.2f}, random ones "
    told += (
        f"{random['hardness']:.2f}; the guide takes {percent(near['masked_weight'])} of their weight, of the others' "
    )
    told += percent(random["masked_weight"])
    if near["known_weight"] is not None:
        known, left = percent(near["known_weight"]), percent(near["known_weight_left"])
        told += f", and leaves {left} of the {known} that known false negatives have there"
    return f"{told}."


def size_at(sizes: list[dict[str, Any]], recipe: dict[str, Any]) -> dict[str, Any]:
    """The largest measured batch that is not above the recipe's, or the smallest."""
    fitting = [size for size in sizes if size["rows"] <= recipe["global_size"]]
    return fitting[-1] if fitting else sizes[0]


def weights_at(source: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Its weights with the recipe's batch size and temperature."""
    return _weights(size_at(source["sizes"], recipe), recipe)


def _weights(size: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    return next(t for t in size["temperatures"] if t["temperature"] == recipe["temperature"])
