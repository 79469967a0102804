"""The pairwise losses hold their own mathematics; that they equal TRL's on a real model stands in tests/golden."""
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from dpo_dist.config.errors import UserError
from dpo_dist.config.loss_options import LOSS_OPTIONS
from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import LossConfig
from dpo_dist.logps import pair_logps
from dpo_dist.losses import LOSSES, check_strengths, preference_logit, preference_loss, rewards
from dpo_dist.types import PackedBatch, PairLogps, TokenLogps

CONF = Path(__file__).parents[2] / "conf" / "loss"
YAML_FILES = sorted(path for path in CONF.glob("*.yaml") if not path.stem.startswith("_"))
LN2 = math.log(2)
DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence": "reverse_kl"}, {"f_divergence": "forward_kl"}, {"f_divergence": "js_divergence"},
    {"f_divergence": "alpha_divergence", "f_alpha": 0.5}, {"f_divergence": "alpha_divergence", "f_alpha": 2.0}]


def config(name: str, **options: Any) -> LossConfig:
    return resolve_loss(LossConfig(name=name, **options))


def mixture(terms: dict[str, float], **options: Any) -> LossConfig:
    return resolve_loss(LossConfig(name="mixture", terms=terms, **options))


def divergences(name: str) -> list[dict[str, Any]]:
    """The f-divergence options under which a loss exists."""
    return DIVERGENCES if "f_divergence" in LOSS_OPTIONS[name].defaults else [{}]


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype)


def make_pairs(chosen: Any, rejected: Any, reference_chosen: Any = -20.0, reference_rejected: Any = -20.0, *,
               chosen_tokens: Any = 10.0, rejected_tokens: Any = 10.0, strength: Any = 1.0,
               mean_chosen_tokens: float = 10.0, wpo_weight: Any = 1.0, tie: Any = None,
               dtype: torch.dtype = torch.float64) -> PairLogps:
    """PairLogps of plain numbers, one for all pairs or one for each."""
    c, r = tensor(chosen, dtype), tensor(rejected, dtype)

    def like(value: Any) -> Tensor:
        return tensor(value, dtype).expand_as(c).clone()

    return PairLogps(
        policy_chosen=c, policy_rejected=r, reference_chosen=like(reference_chosen),
        reference_rejected=like(reference_rejected), chosen_tokens=like(chosen_tokens),
        rejected_tokens=like(rejected_tokens), strength=like(strength), mean_chosen_tokens=mean_chosen_tokens,
        wpo_weight=like(wpo_weight), tie=None if tie is None else torch.as_tensor(tie).expand_as(c))


def random_pairs(n: int = 6, spread: float = 3.0, seed: int = 0) -> PairLogps:
    g = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=g, dtype=torch.float64) * (high - low) + low

    logps = [draw(-20 - spread, -20 + spread) for _ in range(4)]
    return make_pairs(*logps, chosen_tokens=draw(2, 30).round(), rejected_tokens=draw(2, 30).round(),
                      strength=draw(0.5, 4), wpo_weight=draw(0.1, 1))


def slopes(pairs: PairLogps, loss: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d chosen, d loss / d rejected), each (B,)."""
    chosen, rejected = (t.clone().requires_grad_() for t in (pairs.policy_chosen, pairs.policy_rejected))
    value = preference_loss(dataclasses.replace(pairs, policy_chosen=chosen, policy_rejected=rejected), loss)
    by_chosen, by_rejected = torch.autograd.grad(value.sum(), (chosen, rejected), allow_unused=True)
    zero = torch.zeros_like(chosen)
    return value.detach(), zero if by_chosen is None else by_chosen, zero if by_rejected is None else by_rejected


def logistic_loss(x: float) -> float:
    return math.log1p(math.exp(-x))


# ---------------------------------------------------------------------------------------------- tables and config files


def test_every_loss_with_options_is_in_the_table_and_the_other_way_round() -> None:
    assert list(LOSSES) == list(LOSS_OPTIONS)


def test_every_loss_has_a_config_file_of_its_name() -> None:
    assert {path.stem for path in YAML_FILES} == {*LOSSES, "dpo", "mpo", "rpo"}


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: p.stem)
def test_config_file_holds_every_key_sets_only_the_name_and_describes_a_valid_loss(path: Path) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF.parent)):
        raw: Any = OmegaConf.to_container(compose(f"loss/{path.stem}").loss)
    assert set(raw) == {field.name for field in dataclasses.fields(LossConfig)}
    loss = resolve_loss(LossConfig(**raw))
    assert set(loss.weights) <= set(LOSSES)
    assert {key for key, value in raw.items() if value is not None} == ({"name", "terms"} if loss.terms else {"name"})
    assert loss.name == {"dpo": "sigmoid", "mpo": "mixture", "rpo": "mixture"}.get(path.stem, path.stem)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: p.stem)
def test_config_file_names_the_options_of_its_loss_and_their_defaults(path: Path) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF.parent)):
        loss = resolve_loss(LossConfig(**OmegaConf.to_container(compose(f"loss/{path.stem}").loss)))     # type: ignore[arg-type]
    header = next(line for line in path.read_text().splitlines() if line.startswith("# Options"))
    options = {key: value for name in loss.weights for key, value in LOSS_OPTIONS[name].defaults.items()}
    named = re.findall(r"(\w+)(?: ([\d.]+\d|\d))?(?=[,;.])", header.split(":", 1)[1].replace("none", ""))
    assert {key: float(value) if value else None for key, value in named} == {
        key: value if isinstance(value, float) else None for key, value in options.items()}


def test_every_option_is_commented_once() -> None:
    text = re.sub(r"\n +# ", " ", (CONF / "_base.yaml").read_text())                # a comment that goes on below
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line.split(":")[0] for line in lines] == [field.name for field in dataclasses.fields(LossConfig)]
    assert all(line.count(" # ") == 1 for line in lines)


def test_another_loss_may_be_named_on_top_of_the_default_file() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF.parent)):
        raw: Any = OmegaConf.to_container(compose("loss/dpo", overrides=["loss.name=sft"]).loss)
    assert resolve_loss(LossConfig(**raw)).beta is None


@pytest.mark.parametrize(("name", "option"), [
    ("sft", {"beta": 0.1}), ("hinge", {"simpo_gamma": 1.0}), ("simpo", {"ld_alpha": 0.5}), ("aot", {"wpo": True}),
    ("orpo", {"beta": 0.1}), ("bco_pair", {"f_divergence": "forward_kl"})])
def test_an_option_that_the_loss_does_not_use_is_refused_by_name(name: str, option: dict[str, Any]) -> None:
    key, value = next(iter(option.items()))
    with pytest.raises(UserError, match=f"loss.{key}={value} is not used by loss '{name}'"):
        config(name, **option)


OPTION_VALUES: dict[str, dict[str, Any]] = {
    "beta": {"beta": 0.37}, "label_smoothing": {"label_smoothing": 0.23},
    "f_divergence": {"f_divergence": "forward_kl"}, "f_alpha": {"f_divergence": "alpha_divergence", "f_alpha": 0.3},
    "wpo": {"wpo": True}, "discopop_tau": {"discopop_tau": 2.0}, "simpo_gamma": {"simpo_gamma": 0.3},
    "orpo_lambda": {"orpo_lambda": 0.7}, "cpo_alpha": {"cpo_alpha": 0.2}, "odpo_alpha": {"odpo_alpha": 0.4},
    "tie_nu": {"tie_nu": 1.7}}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_changes_with_each_option_that_it_lists_and_with_no_other(name: str) -> None:
    pairs, loss = random_pairs(), config(name)
    before = preference_loss(pairs, loss)
    for option, values in OPTION_VALUES.items():
        changed = not torch.equal(preference_loss(pairs, dataclasses.replace(loss, **values)), before)
        assert changed == (option in LOSS_OPTIONS[name].defaults), option


# --------------------------------------------------------------------------------------------------------- known values


# loss of a pair on which policy and reference agree
AT_THE_REFERENCE: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda beta: LN2,
    "hinge": lambda beta: 1.0,
    "ipo": lambda beta: 1 / (4 * beta**2),
    "sigmoid_norm": lambda beta: LN2,
    "exo_pair": lambda beta: -LN2 - 0.5 * math.log(0.999 * 0.001),
    "robust": lambda beta: LN2,
    "discopop": lambda beta: LN2 / 2 + 0.5,
    "odpo": lambda beta: LN2,                            # at strength 1
    "rao_kupper": lambda beta: math.log(4),              # half of the judgments are ties, a quarter wins
    "davidson": lambda beta: math.log(4),
    "nca_pair": lambda beta: 2 * LN2,
    "bco_pair": lambda beta: 2 * LN2,
    "sppo_hard": lambda beta: 1 / (2 * beta**2),
    "apo_zero": lambda beta: 1.0,
    "apo_down": lambda beta: 1.0,
    "aot": lambda beta: LN2,
    "aot_unpaired": lambda beta: LN2,
}


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_where_policy_equals_reference_is_known_whatever_the_lengths_and_the_divergence(name: str,
                                                                                             beta: float) -> None:
    logps = tensor([-3.0, -80.0, -1000.0])
    pairs = make_pairs(logps, logps * 2, logps, logps * 2, chosen_tokens=[1.0, 30.0, 200.0],
                       rejected_tokens=[50.0, 2.0, 200.0])
    for divergence in divergences(name):
        values = preference_loss(pairs, config(name, beta=beta, **divergence))
        assert values.tolist() == pytest.approx([AT_THE_REFERENCE[name](beta)] * 3, rel=1e-12)


def test_every_loss_with_a_reference_has_a_known_starting_value() -> None:
    assert set(AT_THE_REFERENCE) == {name for name in LOSSES if LOSS_OPTIONS[name].needs_reference}


def test_sigmoid_is_the_logistic_loss_of_beta_times_the_difference_of_log_ratios() -> None:
    pairs = make_pairs([-10.0], [-30.0], [-12.0], [-25.0])                                 # log-ratios 2 and -5
    assert preference_loss(pairs, config("sigmoid", beta=0.5)).item() == pytest.approx(logistic_loss(3.5), rel=1e-12)


def test_simpo_compares_token_means_with_its_margin() -> None:
    pairs = make_pairs([-20.0], [-60.0], chosen_tokens=10.0, rejected_tokens=20.0)         # means -2 and -3
    loss = config("simpo", beta=2.0, simpo_gamma=1.2)
    assert preference_loss(pairs, loss).item() == pytest.approx(logistic_loss(2.0 - 1.2), rel=1e-12)


def test_orpo_adds_the_odds_ratio_of_token_mean_probabilities_to_the_likelihood() -> None:
    pairs = make_pairs([-4 * LN2], [-12 * LN2], chosen_tokens=4.0, rejected_tokens=6.0, mean_chosen_tokens=4.0)
    expected = LN2 + 0.25 * math.log(1 + 1 / 3)          # mean probabilities 1/2 and 1/4: odds 1 and 1/3, odds ratio 3
    assert preference_loss(pairs, config("orpo", orpo_lambda=0.25)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("logp", [-1e-6, -0.01, -0.5, -0.7, -3.0, -60.0])
def test_orpo_keeps_full_precision_for_near_certain_and_near_impossible_completions(logp: float) -> None:
    pairs = make_pairs([logp], [-LN2], chosen_tokens=1.0, rejected_tokens=1.0, mean_chosen_tokens=1.0)
    odds = math.exp(logp) / -math.expm1(logp)                                              # against odds of 1
    expected = -logp + 0.1 * math.log1p(1 / odds)
    assert preference_loss(pairs, config("orpo")).item() == pytest.approx(expected, rel=1e-12)


def test_cpo_is_dpo_without_reference_plus_the_likelihood_of_chosen() -> None:
    pairs = make_pairs([-20.0], [-26.0], chosen_tokens=8.0, mean_chosen_tokens=5.0)
    expected = 0.9 * logistic_loss(1.2) + 0.1 * logistic_loss(-1.2) + 0.5 * 20 / 5
    loss = config("cpo", beta=0.2, cpo_alpha=0.5, label_smoothing=0.1)
    assert preference_loss(pairs, loss).item() == pytest.approx(expected, rel=1e-12)


def test_odpo_asks_for_a_margin_of_alpha_times_the_log_of_the_strength() -> None:
    pairs = make_pairs([-18.0] * 3, [-23.0] * 3, strength=[1.0, math.e, 0.25])             # log-ratios 2 and -3
    expected = [logistic_loss(1.0), logistic_loss(1.0 - 0.6), logistic_loss(1.0 + 0.6 * math.log(4))]
    assert preference_loss(pairs, config("odpo", beta=0.2,
                                         odpo_alpha=0.6)).tolist() == pytest.approx(expected, rel=1e-7)


def test_odpo_names_how_many_rows_have_no_strength_or_one_that_has_no_logarithm() -> None:
    with pytest.raises(UserError, match="of 5 rows 2 have none and 1 have 0 or less"):
        check_strengths(tensor([1.0, math.nan, 0.0, 2.0, math.nan]))
    check_strengths(tensor([0.1, 5.0]))


# d, ν, and P(chosen wins), P(rejected wins), P(tie) in the words of Rao and Kupper (1967) and Davidson (1970)
def rao_kuppers(d: float, nu: float) -> list[float]:
    chosen, rejected = math.exp(d), 1.0
    both = (chosen + nu * rejected) * (nu * chosen + rejected)
    return [chosen / (chosen + nu * rejected), rejected / (nu * chosen + rejected),
            (nu**2 - 1) * chosen * rejected / both]


def davidsons(d: float, nu: float) -> list[float]:
    chosen, rejected = math.exp(d), 1.0
    tie = 2 * nu * math.sqrt(chosen * rejected)
    return [part / (chosen + rejected + tie) for part in (chosen, rejected, tie)]


@pytest.mark.parametrize("d", [-6.0, -1.3, 0.0, 0.4, 2.0, 9.0])
@pytest.mark.parametrize(("name", "model", "nu"), [
    ("rao_kupper", rao_kuppers, 3.0), ("rao_kupper", rao_kuppers, 1.2), ("davidson", davidsons, 1.0),
    ("davidson", davidsons, 0.3)])
def test_losses_of_ties_are_the_models_probabilities_which_add_up_to_one(
        name: str, model: Callable[[float, float], list[float]], nu: float, d: float) -> None:
    wins, loses, tie, both_bad = (
        preference_loss(make_pairs([-20.0 + sign * d / 0.5], [-20.0], tie=[kind]), config(name, beta=0.5, tie_nu=nu))
        for sign, kind in ((1, 0), (-1, 0), (1, 1), (1, 2)))
    found = [math.exp(-loss.item()) for loss in (wins, loses, tie)]
    assert found == pytest.approx(model(d, nu), rel=1e-10) and sum(found) == pytest.approx(1, rel=1e-12)
    assert torch.equal(tie, both_bad), "both bad is a tie"


def test_losses_of_ties_without_any_tie_are_dpo_where_ties_do_not_happen() -> None:
    pairs, dpo = random_pairs(), preference_loss(random_pairs(), config("sigmoid", beta=0.7))
    torch.testing.assert_close(preference_loss(pairs, config("rao_kupper", beta=0.7, tie_nu=1.0)), dpo, rtol=1e-12,
                               atol=0)
    torch.testing.assert_close(preference_loss(pairs, config("davidson", beta=0.7, tie_nu=1e-14)), dpo, rtol=1e-9,
                               atol=0)


@pytest.mark.parametrize("name", ["rao_kupper", "davidson"])
def test_a_tie_pulls_the_margin_to_zero_from_both_sides_and_a_win_always_up(name: str) -> None:
    margins = [-30.0, -2.0, 0.0, 2.0, 30.0]
    logps = [-20.0 + margin for margin in margins]
    _, by_chosen, by_rejected = slopes(make_pairs(logps, [-20.0] * 5, tie=[1] * 5), config(name))
    assert by_chosen.sign().tolist() == [-1, -1, 0, 1, 1] and torch.equal(by_rejected, -by_chosen)
    torch.testing.assert_close(by_chosen, -by_chosen.flip(0), rtol=1e-12, atol=1e-16)        # as far on either side
    _, by_chosen, _ = slopes(make_pairs(logps, [-20.0] * 5, tie=[0] * 5), config(name))
    assert (by_chosen < 0).all()


@pytest.mark.parametrize("name", ["rao_kupper", "davidson"])
def test_gradients_of_losses_of_ties_are_those_of_finite_differences(name: str) -> None:
    pairs, loss, step = random_pairs(8), config(name, beta=0.4), 1e-6
    pairs = dataclasses.replace(pairs, tie=torch.tensor([0, 1, 2, 0, 1, 0, 2, 0], dtype=torch.uint8))
    _, by_chosen, by_rejected = slopes(pairs, loss)
    for field, slope in (("policy_chosen", by_chosen), ("policy_rejected", by_rejected)):
        moved = (dataclasses.replace(pairs, **{field: getattr(pairs, field) + sign * step}) for sign in (1, -1))
        above, below = (preference_loss(one, loss) for one in moved)
        torch.testing.assert_close((above - below) / (2 * step), slope, rtol=1e-7, atol=1e-9)


def test_losses_that_know_no_ties_do_not_look_at_them() -> None:
    pairs = random_pairs()
    tied = dataclasses.replace(pairs, tie=torch.ones(len(pairs.policy_chosen), dtype=torch.uint8))
    for name, options in LOSS_OPTIONS.items():
        same = torch.equal(preference_loss(tied, config(name)), preference_loss(pairs, config(name)))
        assert same != options.knows_ties, name


def test_robust_loss_averages_to_the_clean_loss_when_labels_are_flipped_at_its_rate() -> None:
    pairs = random_pairs()
    flipped = dataclasses.replace(pairs, policy_chosen=pairs.policy_rejected, policy_rejected=pairs.policy_chosen,
                                  reference_chosen=pairs.reference_rejected, reference_rejected=pairs.reference_chosen)
    loss = config("robust", label_smoothing=0.2, beta=0.7)
    average = 0.8 * preference_loss(pairs, loss) + 0.2 * preference_loss(flipped, loss)
    torch.testing.assert_close(average, preference_loss(pairs, config("sigmoid", beta=0.7)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sigmoid", "exo_pair"])
def test_with_label_smoothing_the_best_margin_is_the_log_odds_of_a_right_label(name: str) -> None:
    best = math.log(0.9 / 0.1) / 0.5
    loss, by_chosen, _ = slopes(make_pairs([-20.0 + best], [-20.0]), config(name, beta=0.5, label_smoothing=0.1))
    assert by_chosen.item() == pytest.approx(0, abs=1e-12)
    if name == "exo_pair":
        assert loss.item() == pytest.approx(0, abs=1e-12)


def test_alpha_divergence_is_forward_kl_at_0_and_tends_to_reverse_kl_at_1() -> None:
    pairs = random_pairs()
    forward, reverse = (preference_loss(pairs, config("ipo", f_divergence=kind))
                        for kind in ("forward_kl", "reverse_kl"))
    for alpha, expected, rtol in ((0.0, forward, 1e-12), (1.0, reverse, 0.0), (1 + 1e-9, reverse, 1e-7)):
        value = preference_loss(pairs, config("ipo", f_divergence="alpha_divergence", f_alpha=alpha))
        torch.testing.assert_close(value, expected, rtol=rtol, atol=0)


# ----------------------------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("apo_down", "discopop", "sft")])
def test_raising_chosen_lowers_the_loss_and_raising_rejected_raises_it(name: str) -> None:
    pairs = random_pairs(spread=1.0)
    for divergence in divergences(name):
        _, by_chosen, by_rejected = slopes(pairs, config(name, **divergence))
        assert (by_chosen < 0).all() and (by_rejected > 0).all()


def test_discopop_falls_with_the_margin_except_for_its_bump_just_above_zero() -> None:
    margins = [-30.0, -5.0, -2.0, 0.7, 2.5, 5.0, 30.0]
    pairs = make_pairs([-20.0 + m for m in margins], [-20.0] * 7)
    _, by_chosen, by_rejected = slopes(pairs, config("discopop", beta=0.1))
    assert ((by_chosen > 0) == tensor([False, False, False, True, False, False, False], torch.bool)).all()
    assert torch.equal(by_rejected, -by_chosen)


def test_apo_down_pushes_both_down_and_rejected_further() -> None:
    pairs, loss = random_pairs(spread=1.0), config("apo_down")
    both_up = dataclasses.replace(pairs, policy_chosen=pairs.policy_chosen + 1,
                                  policy_rejected=pairs.policy_rejected + 1)
    _, by_chosen, by_rejected = slopes(pairs, loss)
    assert (preference_loss(both_up, loss) > preference_loss(pairs, loss)).all()
    assert (by_rejected > 0).all() and (by_rejected > by_chosen).all()


def test_sft_raises_chosen_and_does_not_look_at_rejected() -> None:
    _, by_chosen, by_rejected = slopes(random_pairs(), config("sft"))
    assert (by_chosen < 0).all() and (by_rejected == 0).all()


def test_hinge_is_silent_beyond_its_margin() -> None:
    loss, by_chosen, by_rejected = slopes(make_pairs([-9.0], [-20.0]), config("hinge", beta=0.1))         # margin 1.1
    assert loss.item() == by_chosen.item() == by_rejected.item() == 0


# ------------------------------------------------------------------------------------------------------- the whole step


def test_sft_averages_to_the_token_mean_of_chosen_however_the_pairs_are_packed() -> None:
    chosen, tokens, weight = tensor([-12.0, -90.0, -7.0, -33.0]), tensor([3.0, 40.0, 1.0,
                                                                          11.0]), tensor([1.0, 2.0, 0.5, 1.0])
    mean_tokens = float((weight * tokens).sum() / weight.sum())
    packs = [[0, 1], [2], [3]]
    total = 0.0
    for p in packs:
        pairs = make_pairs(chosen[p], chosen[p], chosen_tokens=tokens[p], mean_chosen_tokens=mean_tokens)
        total += (weight[p] * preference_loss(pairs, config("sft"))).sum().item()
    assert total / weight.sum().item() == pytest.approx(-float((weight * chosen).sum() / (weight * tokens).sum()),
                                                        rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pairs_loss_depends_on_the_other_pairs_only_where_the_options_table_says_so(name: str) -> None:
    pairs, loss = random_pairs(), config(name)
    first = {f.name: v[:1] if isinstance(v := getattr(pairs, f.name), Tensor) else v for f in dataclasses.fields(pairs)}
    alone, among_others = preference_loss(PairLogps(**first), loss), preference_loss(pairs, loss)[:1]
    assert torch.equal(alone, among_others) != LOSS_OPTIONS[name].needs_whole_step


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_mean_over_sorted_lists_and_stays_with_its_pair(name: str) -> None:
    pairs, loss = random_pairs(7), config(name, beta=0.5, label_smoothing=0.1)
    c, r, ref_c, ref_r = pairs.policy_chosen, pairs.policy_rejected, pairs.reference_chosen, pairs.reference_rejected
    assert ref_c is not None and ref_r is not None
    above, below = (c - r, ref_c - ref_r) if name == "aot" else (c - ref_c, r - ref_r)
    by_rank = [0.9 * logistic_loss(0.5 * (a - b)) + 0.1 * logistic_loss(-0.5 * (a - b))
               for a, b in zip(sorted(above.tolist()), sorted(below.tolist()), strict=True)]
    in_place = [by_rank[sorted(above.tolist()).index(a)] for a in above.tolist()]
    assert preference_loss(pairs, loss).tolist() == pytest.approx(in_place, rel=1e-12)


def test_mixture_is_the_weighted_sum_of_its_terms_with_each_ones_options() -> None:
    pairs = random_pairs()
    loss = mixture({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}, beta=0.3, label_smoothing=0.1,
                   f_divergence="js_divergence")
    expected = (0.8 * preference_loss(pairs, config("sigmoid", beta=0.3, label_smoothing=0.1,
                                                    f_divergence="js_divergence"))
                + 0.2 * preference_loss(pairs, config("bco_pair", beta=0.3)) + 1.5
                * preference_loss(pairs, config("sft")))
    torch.testing.assert_close(preference_loss(pairs, loss), expected, rtol=1e-12, atol=0)


def test_wpo_weights_the_comparison_with_the_reference_and_leaves_sft_alone() -> None:
    pairs = random_pairs()
    assert pairs.wpo_weight is not None
    expected = 0.7 * pairs.wpo_weight * preference_loss(pairs,
                                                        config("sigmoid")) + 2.0 * preference_loss(pairs, config("sft"))
    found = preference_loss(pairs, mixture({"sigmoid": 0.7, "sft": 2.0}, wpo=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------- from tokens to pairs


def two_pair_batch() -> PackedBatch:
    """Chosen of 4 and 1 tokens, rejected of 2 and 3."""
    lengths, none = torch.tensor([4, 1, 2, 3]), torch.empty(0, dtype=torch.int64)
    return PackedBatch(none[None], none[None], (), none, none, torch.repeat_interleave(torch.arange(4), lengths),
                       torch.cat([torch.arange(n) for n in lengths.tolist()]), lengths, torch.tensor([0, 1]),
                       torch.tensor([2, 3]), (0, 1), torch.ones(2), torch.full((2,), math.nan))


POLICY = tensor([-1, -2, -3, -4, -5, -6, -7, -8, -9, -10])
REFERENCE = POLICY * 0.5


def test_ld_alpha_scales_the_tokens_beyond_the_shorter_completion_in_policy_and_reference() -> None:
    pairs = pair_logps(two_pair_batch(), TokenLogps(POLICY), REFERENCE, config("sigmoid", ld_alpha=0.5), 2.5)
    assert pairs.policy_chosen.tolist() == [-3 - 0.5 * 7, -5] and pairs.policy_rejected.tolist() == [-13, -8 - 0.5 * 19]
    assert pairs.reference_chosen is not None and pairs.reference_chosen.tolist() == [-3.25, -2.5]
    assert pairs.chosen_tokens.tolist() == [4, 1]


def test_ld_alpha_in_a_mixture_leaves_the_likelihood_of_sft_whole() -> None:
    loss = mixture({"sigmoid": 1.0, "sft": 1.0}, ld_alpha=0.0)
    pairs = pair_logps(two_pair_batch(), TokenLogps(POLICY), REFERENCE, loss, 2.5)
    expected = preference_loss(pairs, config("sigmoid", ld_alpha=0.0)) + tensor([10.0, 5.0]) / 2.5
    torch.testing.assert_close(preference_loss(pairs, loss), expected)


def test_wpo_weight_is_the_likelihood_relative_to_a_chance_agreement_at_most_one_and_without_gradient() -> None:
    logps = POLICY.clone().requires_grad_()
    collision = POLICY + tensor([0.1] * 4 + [-3.0] + [0.2] * 5)          # excess a token: -0.1, +3, -0.2, -0.2
    weight = pair_logps(two_pair_batch(), TokenLogps(logps, collision), REFERENCE, config("sigmoid", wpo=True),
                        2.5).wpo_weight
    assert weight is not None and not weight.requires_grad
    assert weight.tolist() == pytest.approx([math.exp(-0.1 - 0.2), 1.0], rel=1e-12)


# -------------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("loss", [
    config("ipo", beta=0.3), config("sigmoid_norm", beta=0.3), config("sigmoid", beta=0.3, f_divergence="forward_kl"),
    mixture({"sft": 1.0, "simpo": 0.5, "hinge": 1.0}, beta=0.3)], ids=lambda loss: "+".join(loss.weights))
def test_reward_with_a_reference_is_beta_times_the_log_ratio_whatever_the_loss(loss: LossConfig) -> None:
    found = rewards(make_pairs([-18.0], [-25.0], chosen_tokens=2.0), loss)
    assert found is not None
    assert [r.item() for r in found] == pytest.approx([0.6, -1.5], rel=1e-12)


@pytest.mark.parametrize(("loss", "expected"), [
    (config("simpo", beta=2.0), [-8.0, -5.0]), (config("orpo", orpo_lambda=0.1), [-0.4, -0.25]),
    (config("cpo", beta=0.1), [-2.0, -2.5]), (mixture({"sft": 1.0, "simpo": 1.0}, beta=2.0), [-8.0, -5.0])],
    ids=["simpo", "orpo", "cpo", "sft+simpo"])
def test_reward_without_a_reference_is_what_the_loss_compares(loss: LossConfig, expected: list[float]) -> None:
    found = rewards(make_pairs([-20.0], [-25.0], chosen_tokens=5.0, rejected_tokens=10.0), loss)
    assert found is not None
    assert [r.item() for r in found] == pytest.approx(expected, rel=1e-12)


def test_rewards_carry_no_gradient_and_sft_has_none() -> None:
    pairs = make_pairs(tensor([-18.0]).requires_grad_(), tensor([-25.0]).requires_grad_())
    found = rewards(pairs, config("sigmoid"))
    assert found is not None and not found[0].requires_grad and not found[1].requires_grad
    assert rewards(pairs, config("sft")) is None


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "davidson", "rao_kupper"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: "-".join(map(str, d.values())))
def test_log_odds_of_a_preference_are_those_whose_cross_entropy_the_loss_is(name: str,
                                                                             divergence: dict[str, Any]) -> None:
    pairs, loss = random_pairs(), config(name, **divergence)
    swapped = PairLogps(pairs.policy_rejected, pairs.policy_chosen, pairs.reference_rejected, pairs.reference_chosen,
                        pairs.rejected_tokens, pairs.chosen_tokens, pairs.strength, pairs.mean_chosen_tokens)
    won, lost = (-preference_loss(one, loss) for one in (pairs, swapped))          # log P of the two outcomes
    assert preference_logit(pairs, loss).tolist() == pytest.approx((won - lost).tolist())


def test_log_odds_of_other_losses_are_the_difference_of_their_rewards() -> None:
    pairs = random_pairs()
    for loss in (config("simpo"), config("apo_zero"), mixture({"sft": 1.0, "sigmoid": 0.3})):
        chosen, rejected = rewards(pairs, loss)
        assert preference_logit(pairs, loss).tolist() == (chosen - rejected).tolist()
    assert preference_logit(pairs, config("sft")) is None


# ------------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_stay_finite_for_log_ratios_of_thousands_of_nats(name: str, dtype: torch.dtype) -> None:
    far = [-5000.0, -2500.0, -0.0]
    grid = [(c, r) for c in far for r in far]
    pairs = make_pairs([c for c, _ in grid], [r for _, r in grid], -2500.0, -2500.0, dtype=dtype)
    for divergence in divergences(name):
        for value in slopes(pairs, config(name, **divergence)):
            assert value.isfinite().all(), divergence


def test_discopop_far_below_the_margin_is_the_logistic_loss_and_not_zero_times_infinity() -> None:
    loss, by_chosen, _ = slopes(make_pairs([-5000.0], [-20.0], dtype=torch.float32), config("discopop", beta=1.0))
    assert loss.item() == pytest.approx(4980.0) and by_chosen.item() == pytest.approx(-1.0)


def test_forward_kl_keeps_the_order_of_ratios_too_small_for_any_float() -> None:
    better = make_pairs([-3000.0], [-5000.0], dtype=torch.float32)
    loss = config("sigmoid", f_divergence="forward_kl")
    assert preference_loss(better, loss).item() == 0.0
    worse = dataclasses.replace(better, policy_chosen=better.policy_rejected, policy_rejected=better.policy_chosen)
    assert preference_loss(worse, loss).item() > 1e6
