"""Which rows a comparison is asked for."""

import pytest

from tools.base.errors import UserError
from tools.plans.jobs import ALL_ALLOCATIONS, ALL_METHODS, PartsRecipe, list_jobs, list_standing
from tools.plans.methods import METHODS
from tools.plans.rules import RULES, name_allocations


def test_all_is_every_method_with_every_allocation_once() -> None:
    jobs = list_jobs("wanda:uniform,all,wanda:uniform", "0.45,0.450,0.6")
    labels = [job.label for job in jobs]
    assert len(jobs) == len({job.key for job in jobs}) == 2 * len(ALL_METHODS) * len(ALL_ALLOCATIONS)
    assert labels[0] == "wanda:uniform"
    sequential = [name for name in ALL_METHODS if METHODS[name.removesuffix("+refit")].statistics == "sequential"]
    marked = {f"{name}:evolution": f"{name}~dense:evolution" for name in sequential}
    every = [f"{method}:{allocation}" for method in ALL_METHODS for allocation in ALL_ALLOCATIONS]
    assert set(labels) == {marked.get(label, label) for label in every}
    assert {method.removesuffix("+refit") for method in ALL_METHODS} == set(METHODS)
    assert {*ALL_ALLOCATIONS} == {*RULES, *name_allocations("search")}


def test_baselines_stand_before_what_is_our_own() -> None:
    methods = [
        "magnitude",
        "wanda",
        "alps",
        "sparsegpt",
        "two-sided",
        "two-sided-obs",
        "two-sided+refit",
        "refit",
    ]
    allocations = ["uniform", "owl", "alphapruning", "evolution", "kappa"]
    assert [name for name in ALL_METHODS if name in methods] == methods
    assert [name for name in ALL_ALLOCATIONS if name in allocations] == allocations


def test_with_a_pattern_each_method_is_one_row() -> None:
    jobs = list_jobs("all,refit:kappa@0.5", "2:4,02:4,4:8,0.5")
    patterned = [job for job in jobs if job.pattern]
    assert [job.title for job in patterned] == [f"{m}:uniform at {p}" for p in ("2:4", "4:8") for m in ALL_METHODS]
    assert {job.sparsity for job in jobs} == {0.5}
    assert all(job.recipe.allocation == job.allocation == "uniform" for job in patterned)
    assert [job.title for job in jobs if not job.pattern][-1] == "refit:kappa@0.5 at 50%"


def test_structured_recipes_have_no_row_for_a_pattern() -> None:
    labels = ["structured:flap", "structured:equal", "structured+refit:equal", "structured+refit:depth"]
    jobs = list_jobs(",".join([*labels, "wanda:uniform"]), "0.2,2:4")
    assert [job.title for job in jobs] == [
        *(f"{label} at 20%" for label in labels),
        *("wanda:uniform at 20%", "wanda:uniform at 2:4"),
    ]
    assert [(job.kind, job.recipe) for job in jobs[:4]] == [
        ("parts", PartsRecipe("flap", ("neurons", "heads"), refit=False)),
        ("parts", PartsRecipe("equal", ("neurons", "heads"), refit=False)),
        ("parts", PartsRecipe("equal", ("neurons", "heads"), refit=True)),
        ("parts", PartsRecipe("depth", ("blocks",), refit=True)),
    ]


def test_rows_of_a_search_say_that_their_statistics_are_dense() -> None:
    jobs = list_jobs("sparsegpt:evolution,sparsegpt~dense:evolution,refit:evolution,wanda+refit:evolution", "0.5,2:4")
    assert [(job.title, job.recipe.statistics) for job in jobs] == [
        ("sparsegpt~dense:evolution at 50%", "dense"),
        ("refit:evolution at 50%", "dense"),
        ("wanda+refit~dense:evolution at 50%", "dense"),
        ("sparsegpt:uniform at 2:4", "sequential"),  # a pattern leaves nothing to search for
        ("sparsegpt~dense:uniform at 2:4", "dense"),
        ("refit:uniform at 2:4", "dense"),
        ("wanda+refit:uniform at 2:4", "sequential"),
    ]


def test_labels_are_told_apart_by_what_they_mean() -> None:
    jobs = list_jobs("wanda, wanda:uniform@0.5,two-sided~clipped:evolution,refit+refit:kappa-mask@1", "0.575")
    assert [job.title for job in jobs] == [
        *("wanda:uniform at 57.5%", "two-sided~clipped:evolution at 57.5%", "refit:kappa-mask at 57.5%")
    ]
    assert [job.recipe.allocation for job in jobs] == ["uniform", "uniform", "kappa"]


@pytest.mark.parametrize(
    ("recipes", "sparsity", "sentence"),
    [
        ("wanda:nonsense", "0.45", "recipe 'wanda:nonsense': there is no allocation 'nonsense'; there are "),
        ("wanda:nonsense", "2:4", "recipe 'wanda:nonsense': there is no allocation 'nonsense'; there are "),
        ("nonsense:kappa", "0.45", "recipe 'nonsense:kappa': method: input should be 'magnitude', 'wanda', "),
        ("nonsense:evolution", "0.45", "recipe 'nonsense:uniform': method: input should be"),
        ("wanda:kappa@2", "0.45", "recipe 'wanda:kappa@2': strength: "),
        ("Wanda kappa", "0.45", "recipe 'Wanda kappa' is not of the form METHOD[+refit]:ALLOCATION"),
        (
            "structured:owl",
            "0.2",
            "recipe 'structured:owl' is none of structured:flap, structured:llm-pruner, structured:shortgpt, "
            "structured:sleb, structured:slicegpt, structured[+refit]:equal, structured[+refit]:depth, "
            "structured[+refit]:kappa",
        ),
        ("structured", "0.2", "recipe 'structured' is none of structured:flap, structured:llm-pruner"),
        ("structured+refit:flap", "0.2", "recipe 'structured+refit:flap' is none of structured:flap, structured:llm"),
        ("wanda:flap", "0.2", "recipe 'wanda:flap': there is no allocation 'flap'; "),
        (
            "sparsegpt~sequential:evolution",
            "0.45",
            "recipe 'sparsegpt~sequential:evolution': a search prunes layers by dense statistics, as EvoPress does; "
            "leave ~sequential out",
        ),
        ("structured:flap", "2:4", "patterns are not for structured recipes; try --sparsity 0.2"),
        (" , ", "0.45", "no recipe is given; try --recipes wanda:uniform,refit:kappa"),
        ("all", ",", "no sparsity is given; try --sparsity 0.45"),
        ("all", "half", "sparsity 'half' is neither a fraction such as 0.45 nor a pattern such as 2:4"),
        ("all", "4:2", "sparsity '4:2' is neither a fraction such as 0.45 nor a pattern such as 2:4"),
        *(("all", text, f"sparsity '{text}' must lie between 0 and 1, such as 0.45") for text in ("45", "0", "nan")),
    ],
)
def test_recipes_and_sparsities_that_there_are_not(recipes: str, sparsity: str, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        list_jobs(recipes, sparsity)
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)


def test_a_polish_without_tokens_is_on_the_config_s_and_its_row_says_so() -> None:
    jobs = list_jobs("refit+polish:kappa,refit+polish64:kappa,wanda+polish:evolution", "0.5,2:4", 4096)
    assert [(job.label, job.pattern) for job in jobs] == [
        ("refit+polish4096:kappa", ""),
        ("refit+polish64:kappa", ""),
        ("wanda~dense+polish4096:evolution", ""),
        ("refit+polish4096:uniform", "2:4"),
        ("refit+polish64:uniform", "2:4"),
        ("wanda+polish4096:uniform", "2:4"),
    ]
    assert [job.label for job in list_jobs("refit+polish64:kappa", "0.5")] == ["refit+polish64:kappa"]
    line = r"^recipe 'refit\+polish:kappa' polishes, on no tokens; give --polish-tokens, or write \+polish25000$"
    with pytest.raises(UserError, match=line):
        list_jobs("refit+polish:kappa", "0.5")


def test_a_polish_finds_the_model_of_the_row_that_it_stands_on_but_behind_no_other() -> None:
    labels = "refit:kappa,refit+polish64:kappa,refit+polish128:kappa,wanda,refit+polish256:kappa"
    jobs = list_jobs(labels, "0.5,2:4")
    standing = list_standing(jobs)
    assert [job.title for job in standing] == [
        "refit+polish64:kappa at 50%",
        "refit+polish128:kappa at 50%",
        "refit+polish64:uniform at 2:4",
        "refit+polish128:uniform at 2:4",
    ]
    assert jobs[0].polishes is None and jobs[1].polishes == jobs[4].polishes == jobs[0].key
    searched = list_jobs("wanda~dense:evolution,wanda~dense+polish64:evolution", "0.5")
    assert list_standing(searched) == [], "each searches for its own"
