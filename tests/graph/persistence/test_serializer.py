"""Checkpoints as bytes: every value keeps its type, those of earlier versions are read, and nothing else is revived."""

import base64
import logging
from typing import Any

import numpy as np
import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.types import Interrupt

from graph.config import RunConfig
from graph.persistence.serializer import FORMER_HOMES, STATE_MODELS, make_serializer, rename_moved
from graph.planning.plan import Plan
from graph.reflecting.schema import Lesson
from graph.state import Input, State, Trial
from tests.graph.persistence.values import TRIAL, VALUES
from tools.base.settings import WorkbenchSettings
from tools.plans.recipe import Adjustment, Recipe
from tools.results.schema import Usage


def test_values_cover_the_whole_state() -> None:
    assert VALUES.keys() == State.model_fields.keys()


def test_every_value_keeps_its_type(caplog: pytest.LogCaptureFixture) -> None:
    serde = make_serializer()
    for name, value in VALUES.items():
        again = serde.loads_typed(serde.dumps_typed(value))
        assert type(again) is type(value), name
        assert again == value, name
    assert not caplog.records


def test_another_class_is_not_revived() -> None:
    serde = make_serializer()
    again = serde.loads_typed(serde.dumps_typed(WorkbenchSettings()))
    assert again == WorkbenchSettings().model_dump()


def test_what_was_written_before_checkpoints_were_compressed_is_read() -> None:
    plain = JsonPlusSerializer(allowed_msgpack_modules=STATE_MODELS)
    state = State(run="r", trials=[TRIAL] * 9)
    assert make_serializer().loads_typed(plain.dumps_typed(state)) == state
    kind, data = make_serializer().dumps_typed(state)
    assert (kind, len(data) < len(plain.dumps_typed(state)[1]) / 2) == ("msgpack+zlib", True)


def test_the_state_holds_nothing_by_layer() -> None:
    """No field grows with the model: lists are of trials, costs, lessons and the like, and plans speak in selectors."""
    lists = {name for name, field in State.model_fields.items() if "list" in str(field.annotation)}
    assert lists == {"trials", "counted", "lessons", "experience", "notes", "probes", "written"}


BEFORE_THE_ROOMS = (
    r"c-rk(y>A>v6yHlQq@aipe}HQwEaD(VN@F7m6bT^|pv`J-_TBB|c6Zh@v$ij3AVd^MAX~TrQC#BP`}CciI3UrT?7~Ke1rik!vP4Hg!JojJo!$"
    r"HL6)8xR!du+VyqSITd++_;dvjm4Y+EWKlx-hfo7?J?1qs~+lqg7U1YxA^ZHp*)AnF1_k5nJ5?EBmS&t4@Sb8wS=Tk@bzc~D~I<BQ$7tsSGmN"
    r"Ln|e;N5g|YQ3E}sv1IE3a>8K9av=)ViGC-NQp=)TY%3|9YyU2NqWY9NN9zW;kxJfw)8o^7CRKrEefI-50bFzaN5q03<a?Qsm!po65$wEWUZG"
    r"E?T|1bPYTxVm@3<6>jNu$>T4`;_}a+@Ykz!;k;=<^XrRL&P`Tu#$0G>2?9z@#F`UH`z_A)@TvR|H7&EYyD}XrCN)(Y5xsiCxXUa;X%axpKmj"
    r"pnONLV4Y*!R6?+l`9tB2m<}CA$NKT?|_plr2LdBvaMF((hN(rx6mRKm@g(Pu6XQ!xWpm^hD1A(MA|K$5y-ofwY>q9qplTv4uevyu>^>*j6MO"
    r"EFBt!k9`){B|>$S6k3kThTdwB5WiW4IN$+1)(0R>(6$k(e}2)=NdvbjplY*S^f;}^`M2J@(m+lH0f?3hkzg1fx|d1tIL|900aCraT#7pUP}R"
    r"Em90TOZmv{521mv9~2g~>RDY*U7cStvzX+jT?Kbc(Qks4n`Uz9wA%g4bDWjT-^#wBNu_;Gr9>X0td8;PWt54bW|zBM66XA1`M!lP^#_@NGEB"
    r"%r^i9i53y6ni5H<#KdH-N(cd)x%kN8*2|77e1KG`}jkYe$hNbD=Yz&h43Y6R4#XtH4-?agBCL6pn_1&CF$g#jX~kmq+|u@L7Gwt2+GPGEd6U"
    r"xC1v9KB*F6;R*y)mg3Q#mHHOsNGI7u_7*Ba!i-zp(5a%{l4j)aHn}`>Tr<-pqtm^RGt|MXbo4O`07ujpDocU$j<7@rcWo5UIh7t5eOSw>;cO"
    r"#+3@*rF5NFR-wPtEN3k*8SbF-+x8XO=?@8}a1kapAM6iu$o$IJGXfhDljyQx|9@<SbAzDPCDT>-RQBJ@jB5W&MX0Z?N>6v7lM;Y!HHr{tk6X"
    r"P=<UK3UC<J8LoH#{H=bz>rLiwzn#v_7xj!oja3l(%ckHa`7-NkDN$<E1W2Pjg8+xmi2#i}-E*$b3P!^Ni7&Z%bUGP~`upj^*QURXMI<w`mcf"
    r"dBEY367HN~ga(Cb5&H+}RTW-ChmFcR!d>ne7Dh`QvFpfKFhP8+79%kaoYlt+Oom~L3>NaE}MsJrRGEK8F}V*Vf9n%n9s&ONyxBXqH-CZA~e{"
    r"UoiGg`KoQWmV(k;@@3Uk}|<!oEDFz`*;3&ulM@hna8BwJAUQWDQ<tHe^0H~ChiNh7S*UrSS@SWE#dqo@EmRef95^+MZO7aoVWky*8Uq=IBTY"
    r"+_DA*3N{jn>zkj-Z-$3wan=)9Ngi;7GgUqy>Pi^heetr))Z}`uu;pfeLV=RKE4QB1mnrL^{WV5s4iB#D;Qx9XQc=&YJjLcO>`@`;Q1hRhf#q"
    r"!}S@a<7%9o?Nap#9Ep@qbOaSwMP-IH2xz#jmFsbS5OfT2{eCJ`c*$PloPY8;dVmD56l=Hr~Czzwpg2>L{B#ioS5j){T6}=ZRJf_s;(TJ(GVx"
    r"W99B4a~@tR?Fx_~CMwtx%b!pB{{d_(#)A"
)
"""One value of every class of the state, one among the writes that a kill left pending and one in a question to a
person, as they were written when tools/ was one flat folder: compressed, and in base 85."""


def test_checkpoints_of_the_flat_folder_are_read(caplog: pytest.LogCaptureFixture) -> None:
    old = base64.b85decode(BEFORE_THE_ROOMS)
    trial = Trial(
        **{"iteration": 1, "checkpoint": "ab12", "sparsity": 0.3, "perplexity": None, "kl": 0.25, "predicted_kl": 0.2},
        **{"verdict": "rollback", "recipe": Recipe()},
    )
    adjustment = Adjustment(selector="*.v_proj", action="factor", factor=2.0, reason="they hurt")
    recipe = Recipe(method="wanda", refit=False, statistics="dense")  # as it was carried out then
    plan = Plan(sparsity=0.3, recipe=recipe, adjustments=[adjustment], reason="small steps")
    lesson = {"run": "r", "iteration": 1, "selector": "*.v_proj", "factor": 2.0, "predicted": 0.2, "measured": 0.4}
    wanted: dict[str, Any] = {
        "__start__": Input(run="r", replay="q"),
        "config": RunConfig(
            target_sparsity=0.3, protect=["blocks 0-1"], bos="never", text_spread=1, gradient_windows=4
        ),
        "plan": plan,
        "trials": [trial],
        "lessons": [Lesson(**lesson, text="dear")],
        "usage": Usage(calls=1, input_tokens=1000, output_tokens=50, cost=0.01),
        "state": State(
            run="r", trials=[trial], plan=plan, config=RunConfig(bos="never", text_spread=1, gradient_windows=4)
        ),
        "recipe": Recipe(curves="method"),
        "adjustment": adjustment,
        "branch:to:plan": None,
        "evaluated_tokens": 2**40,
        "seconds": 0.1,
        "__interrupt__": [Interrupt(value={"plan": plan, "iteration": 1}, id="7f")],
    }
    found = make_serializer().loads_typed(("msgpack+zlib", old))
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert type(found[name]) is type(value) and found[name] == value, name
    assert not caplog.records, "none is taken for a stranger"


def test_only_the_state_models_are_revived_by_a_former_name(caplog: pytest.LogCaptureFixture) -> None:
    assert {model for models in FORMER_HOMES.values() for model in models} <= set(STATE_MODELS)
    known, stranger = Recipe.model_dump(Recipe()), WorkbenchSettings().model_dump()
    plain = JsonPlusSerializer()

    def load(module: str, name: str, values: dict[str, Any]) -> Any:
        class Moved(WorkbenchSettings):
            def model_dump(self, **_: Any) -> dict[str, Any]:
                return values

        Moved.__module__, Moved.__name__ = module, name
        return make_serializer().loads_typed(plain.dumps_typed([Moved()]))

    assert load("tools.recipes", "Recipe", known) == [Recipe()]
    with caplog.at_level(logging.ERROR):
        assert load("tools.recipes", "WorkbenchSettings", stranger) == [stranger]
        assert load("tools.recipes.deeper", "Recipe", known) == [known]
        assert load("os", "Recipe", known) == [known]


def test_what_names_no_former_module_is_left_as_it_is() -> None:
    values = VALUES | {
        "trials": [TRIAL] * 3,
        "array": np.arange(6.0).reshape(2, 3),
        "numbers": [2**63, -1, 0.1, {1: b"x"}],
    }
    kind, data = JsonPlusSerializer().dumps_typed(values)
    assert kind == "msgpack" and rename_moved(data) == data
