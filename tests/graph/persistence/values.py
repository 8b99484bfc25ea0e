"""A value for every field of the state."""

from typing import Any

from graph.config import RunConfig
from graph.goals.schema import Aim, Brief, NewText
from graph.planning.plan import Plan, PlannedText
from graph.reflecting.schema import Experience, Lesson, Note
from tools.instruments.probed import PastProbe
from tools.plans.groups import Group, GroupRecipe
from tools.plans.recipe import Adjustment, Recipe
from tools.results.schema import TextFigures, Usage
from tools.results.trial import Trial

TEXT = TextFigures(name="code", weight=1.0, perplexity=None, kl=0.25, kl_error=0.01, change=-0.5)
GROUP = Group(selector="*.v_proj", recipe=GroupRecipe(method="wanda", refit=False, damping=0.3, pattern="2:4"))
TRIAL = Trial(
    iteration=1,
    checkpoint="ab12",
    sparsity=0.3,
    perplexity=None,
    kl=0.25,
    texts=[TEXT],
    predicted_kl=0.2,
    verdict="rollback",
    groups=[GROUP],
)
LESSON = Lesson(run="r", iteration=1, selector="*.v_proj", factor=2.0, predicted=0.2, measured=0.4, text="dear")
VALUES: dict[str, Any] = {
    "run": "r",
    "replay": "q",
    "came_from": "1ef4f797-8335-6428-8001-8a1503f9b875",
    "config": RunConfig(target_sparsity=0.3, protect=["blocks 0-1"]),
    "profile": "cd34",
    "parts": "ef56",
    "dense": TRIAL.model_copy(update={"iteration": 0, "perplexity": 12.5, "verdict": "accept"}),
    "brief": Brief(
        reason="code stands for the calls",
        aims=[Aim(name="code", weight=3.0, max_rise=0.2), Aim(name="tales", weight=1.0)],
        new_texts=[NewText(name="tales", prompts=["Once", "Twice", "Thrice"])],
        probes=["def f("],
    ),
    "written": [NewText(name="songs", prompts=["La", "Le", "Li"])],
    "iteration": 1,
    "plan": Plan(
        sparsity=0.3,
        recipe=Recipe(method="wanda", refit=False),
        groups=[GROUP],
        adjustments=[Adjustment(selector="*.v_proj", action="factor", factor=2.0, reason="they hurt")],
        new_texts=[PlannedText(name="songs", prompts=["La", "Le", "Li"], weight=0.5)],
        reason="small steps",
    ),
    "order": "ef56",
    "current": "ab12",
    "accepted": "dense",
    "accepted_plan": Plan(sparsity=0.2, reason="smaller"),
    "trials": [TRIAL],
    "lessons": [LESSON],
    "notes": [Note(run="r", iteration=1, sparsity=0.3, pattern="", text="clip less", trials=[1])],
    "judged": {1: "As was expected."},
    "probes": [
        PastProbe(
            number=1, iteration=1, plan="30.0% wanda", tokens=64, kl=0.2, kl_error=0.1, change=None, change_error=None
        )
    ],
    "experience": [
        Experience(levers="refit: strength 0.8 for 1", sparsity=0.3, change=-0.02, error=0.01, trials=2, runs=1)
    ],
    "reprofile": True,
    "usage": Usage(calls=1, input_tokens=1000, output_tokens=50, cost=0.01),
    "stop": "patience",
    "evaluated_tokens": 4096,
    "counted": ["curves of refit"],
    "probed": {"0123": 128},
    "seconds": 1.5,
}
