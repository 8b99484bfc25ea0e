"""The report: what it says of made-up runs, to the word; that nothing in it is obeyed; that every run has one."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.made_runs import KINDS, add_round, begin_run, end_run, make_layers, tell_node, write_run
from tools.base.rundir import LAST, append_event
from tools.results.page.contents import describe_run, find_costs, list_scores, place_retention
from tools.results.page.page import write_page
from tools.results.page.record import read_run
from tools.results.schema import Knowledge, Sample, Score

EVIL = "<script>alert(1)</script>\"'&\x1b[31m\x00\u202e\uffff{{ 7 * 7 }}"
"""As a model might say it."""

VOID = ("meta", "link", "path", "use", "br")


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.page = page
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.words.append((self.open[-1], " ".join(data.split())))

    def all(self, tag: str) -> list[str]:
        """The text in every element of a kind."""
        return [text for inside, text in self.words if inside == tag]


def read_page(*runs: Path) -> Reader:
    reader = Reader(write_page(runs))
    assert reader.open == []
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return reader


def test_a_finished_run_to_the_word(tmp_path: Path) -> None:
    page = read_page(write_run(tmp_path / "demo"))
    assert page.all("title") == ["demo: tiny · Billhook", *_list_titles(read_run(tmp_path / "demo"))]
    assert page.all("h1") == ["tiny"]
    assert page.all("h2") == [
        *("Over the iterations", "Layer by layer", "Predicted and measured", "Trials", "Protocol and cost", "Load it")
    ]
    tiles = [text for inside, text in page.words if inside in ("dt", "b")][:10]
    assert tiles == [
        *("Zero weights", "45.00%", "Perplexity on test", "22.00", "Perplexity lost", "0.40 ×"),
        *("KL to dense", "0.1000", "Trials", "2"),
    ]
    assert (
        "45.00% of the 8,000 prunable weights are zero (target 45.00%), 36.00% of the whole model, after 2 iterations "
        "with 1 rollback. Test perplexity is 22.00; dense 20.00, uniform Wanda at the same sparsity (each block behind "
        "its pruned predecessors) 25.00, so the degradation is 0.40 times uniform "
        "Wanda's. The plan that was kept: 30.0% refit:kappa; the loop ended because 2 iterations were asked for and "
        "done."
    ) in page.all("p")
    assert "What was measured is between 1.25 and 5.00 times what was predicted, 2.50 times in the geometric mean of " \
        "2 trials." in page.all("p")  # fmt: skip
    spans = page.all("span")
    assert [spans[spans.index("1") + i] for i in range(6)] == [
        "1",
        "● kept",
        "30.00%",
        "21.00",
        "0.1000",
        "30.0% refit:kappa",
    ]
    assert "✖ rolled back" in spans and "because as planned" in page.all("dd")
    facts = dict(zip(page.all("dt")[-11:], page.all("dd")[-11:], strict=True))
    assert facts["Test text"] == "pydoc: 4,096 tokens in windows of 512, fp32; seen once, by no agent"
    assert facts["Time"] == "5 min 1 s, peak memory 1.50 GB"
    assert facts["Versions"] == "torch 2.9.1, python 3.11"
    assert facts["Spent on agents"] == "nothing: no model was asked"
    assert 'model = AutoModelForCausalLM.from_pretrained("model")' in page.all("pre")[-1]


def _list_titles(record: Any) -> list[str]:
    costs = [f"{cell.name}: {cell.value:.3g}" for cell in find_costs(record)]
    return [f"{n}: {s:.2%}" for n, s in zip(record.layers.names, record.layers.sparsity, strict=True)] + costs


def test_nothing_that_was_said_is_obeyed(tmp_path: Path) -> None:
    layers = make_layers(kinds=(KINDS[0], f"mlp.{EVIL}"))
    run = begin_run(tmp_path / "demo", layers, model=EVIL)
    add_round(run, 1, "accept", layers, words=EVIL)
    append_event(run, {"type": "warning", "text": EVIL})
    end_run(
        run,
        model=EVIL,
        samples=[Sample(prompt=EVIL, dense="<b>a", pruned="<b>c")],
        benchmarks=[make_score("<i>pruned</i>", 0.5)],
    )
    page = read_page(run)
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "img", "form", "b>a", "i"} == {"i"}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    said = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
    assert page.all("h1") == [said]
    assert said in page.all("pre") and f"because {said}" in page.all("dd") and f"Warning: {said}" in page.all("p")
    assert f"model.layers.0.mlp.{said}: 25.00%" in page.all("title")
    assert "<i>pruned</i>" in page.all("td") and f"{said}<b>" in page.all("span")
    assert not [c for c in page.page if ord(c) < 32 and c != "\n"] and "\u202e" not in page.page


def test_no_resource_is_loaded(tmp_path: Path) -> None:
    page = read_page(
        write_run(tmp_path / "demo", samples=[Sample(prompt="http://x.example/a.js", dense="", pruned="")])
    )
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            address = attributes.get(name)
            assert address is None or address == "data:," or (tag == "use" and address.startswith("#")), (tag, address)
    css = page.page.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in css and "url(" not in css and "@font-face" not in css
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_colours_and_fonts_are_the_pages(tmp_path: Path) -> None:
    figures = re.findall('<svg [^>]*class="figure".*?</svg>', write_page([write_run(tmp_path / "demo")]), re.DOTALL)
    assert len(figures) == 5
    for svg in figures:
        assert "var(--muted)" in svg and "font-family" not in svg and "<style" not in svg and "#000000" not in svg
        assert not re.search("#0[1-6]0a0[1-6]", svg)


def make_score(model: str, value: float, error: float | None = 0.02, task: str = "mmlu") -> Score:
    return Score(model=model, task=task, metric="acc", value=value, error=error, samples=500, protocol={"shots": 5})


def test_knowledge_benchmarks_and_samples_are_shown_with_their_errors(tmp_path: Path) -> None:
    knowledge = Knowledge(
        **{"source": "file:q.jsonl", "pairs": 200, "dense": -2.5, "pruned": -2.9, "uniform_wanda": None},
        **{"retention": 0.67, "retention_error": 0.03},
    )
    run = write_run(
        tmp_path / "demo",
        knowledge=knowledge,
        benchmarks=[make_score("dense", 0.40), make_score("pruned", 0.30), make_score("dense", 2, None, "other")],
        samples=[Sample(prompt="The capital of", dense=" France is Paris", pruned=" France is\nLyon")],
    )
    page = read_page(run)
    assert page.all("caption")[0].startswith("200 questions of file:q.jsonl: log-probability of the right answer")
    cells = page.all("td")
    assert cells == [
        *("-2.5000", "-2.9000", "67.0% ± 3.0%", "dense", "0.400 ± 0.020", "500", "pruned", "0.300 ± 0.020", "500"),
        *("dense", "2", "500"),
    ]
    assert [text for text in page.all("pre") if text in ("Paris", "Lyon")] == ["Paris", "Lyon"]
    begun = '<span class="same">The capital of France is</span>'
    assert f"{begun} Paris</pre>" in page.page and f"{begun}\nLyon</pre>" in page.page
    summary = read_run(run).summary
    rows = list_scores(summary)
    assert [row.first for row in rows] == [True, False, True]
    assert [tuple(row.bar) for row in rows[:2]] == [(84.29, 70.57, 98.0), (15.71, 2.0, 29.43)]
    assert place_retention(knowledge) == (66.32, 63.44, 69.2) and place_retention(None) is None


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first")
    second = begin_run(tmp_path / "second", make_layers())
    page = read_page(first, second)
    assert page.all("h1") == ["2 runs side by side"] and page.all("h2")[:2] == ["first", "second"]
    assert page.all("td") == [
        *("finished", "45.00%", "22.00", "20.00", "25.00", "0.1000", "2", "1", "0"),
        *("unfinished", "0.00%", "20.00 so far", "20.00", "0.0000", "0", "0", "0"),
    ]
    assert page.all("h3").count("first") == 6 and page.all("h3").count("second") == 5
    assert "finished" in page.all("span") and "unfinished" in page.all("span")
    assert 'model = AutoModelForCausalLM.from_pretrained("first/model")' in page.all("pre")[-1]
    assert "Nothing has been measured yet." in page.all("p") and "The weights are dense." in page.all("p")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "new")
    assert describe_run(read_run(run)) == [
        "This run has not finished: 0 of at most 8 iterations are done, 0 of them rolled back.",
        "The last step begun: profile.",
    ]
    assert read_page(run).all("h2") == ["Protocol and cost"]


def test_a_run_that_was_stopped_says_how_to_go_on(tmp_path: Path) -> None:
    layers = make_layers()
    run = begin_run(tmp_path / "cut", layers, max_iterations=6)
    add_round(run, 1, "accept", layers)
    tell_node(run, "plan", 2)
    with (run / "events.jsonl").open("a") as log:
        log.write('{"time": 1, "type": "trial", "iterat\n')  # a kill cut it short
    append_event(
        run, {"type": "stopped", "reason": "the endpoint is gone.", "resume": "python -m graph.run --resume cut"}
    )
    record = read_run(run)
    assert record.unread == 0
    first, second, third = describe_run(record)
    assert [first, third] == [
        "This run has not finished: 1 of at most 6 iterations are done, 0 of them rolled back.",
        "The process ended: the endpoint is gone; to go on: python -m graph.run --resume cut",
    ]
    assert second == (
        "So far 30.00% of the prunable weights are zero (target 45.00%), at a validation perplexity of 21.00; "
        "dense 20.00."
    )
    assert "stopped" in read_page(run).all("span")
    append_event(run, {"type": "start", "run": "cut", "resumed": True})
    assert describe_run(read_run(run))[-1] == "The last step begun: plan."


def test_lines_of_another_form_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    layers = {"names": ["a"], "blocks": [], "kinds": ["k"], "sparsity": [0.1], "checkpoint": "c"}
    for event in (
        {"type": "trial", "iteration": "many"},
        {"type": "layers", **layers},
        {"type": "profile", "profile": "../../etc/passwd"},
        {"type": "node"},
        {"type": "note", "text": 7},
    ):
        append_event(run, event)
    lines = (run / "events.jsonl").read_bytes().splitlines()
    lines += [b'["type", {"type": "trial"}]', b'{"type": "warning", "text": "half a pair: \\ud800"}']
    (run / "events.jsonl").write_bytes(b"\n".join(lines))
    (run / LAST).unlink()
    assert read_run(run).unread == 6
    page = read_page(run)
    assert "6 lines of events.jsonl could not be read, and what they say is missing here." in page.all("p")
    assert "Warning: half a pair:" in page.all("p") and page.page.encode("utf-8")


def test_a_run_in_which_everything_was_rolled_back(tmp_path: Path) -> None:
    layers = make_layers()
    run = begin_run(tmp_path / "back", layers)
    add_round(run, 1, "rollback", layers, perplexity=None, kl=None, kl_error=None)
    add_round(run, 2, "rollback", layers, kl_error=float("inf"))
    add_round(run, 3, "refuse", layers, perplexity=None, kl=None)
    end_run(
        run,
        **{"status": "short-of-target", "achieved_sparsity": 0.0, "rollbacks": 2, "iterations": 3},
        perplexity={"dense": 20.0, "pruned": 20.0, "uniform_wanda": None},
    )
    page = read_page(run)
    assert "short of target" in page.all("span") and "◆ refused" in page.all("span")
    assert describe_run(read_run(run))[1] == (
        "No plan was kept, so nothing was pruned; the loop ended because 2 iterations were asked for and done."
    )
    assert page.all("h2") == ["Over the iterations", "Predicted and measured", "Trials", "Protocol and cost", "Load it"]
    assert "Not drawn: 1 trial whose KL was not finite, or 0." in page.all("p")
    assert "What was measured is 1.25 times what was predicted." in page.all("p")
    assert page.all("span").count("not finite") == 2


def test_nothing_but_infinities(tmp_path: Path) -> None:
    layers = make_layers()
    run = begin_run(tmp_path / "inf", layers, perplexity=float("inf"))
    add_round(run, 1, "rollback", layers, perplexity=float("inf"), kl=float("nan"), predicted_kl=0.0)
    end_run(run, perplexity={"dense": None, "pruned": None, "uniform_wanda": None}, kl=None)
    page = read_page(run)
    assert "Predicted and measured" not in page.all("h2") and page.all("b")[1:3] == ["not finite", "not finite"]


@pytest.mark.parametrize("blocks", [1, 400])
def test_models_with_one_block_and_with_many(blocks: int, tmp_path: Path) -> None:
    layers = make_layers(blocks)
    run = begin_run(tmp_path / "deep", layers)
    add_round(run, 1, "accept", layers, sparsity=0.45)
    page = read_page(run)
    assert len(page.all("title")) == 1 + 2 * len(layers)
    heights = [float(a["viewbox"].split()[3]) for tag, a in page.tags if a.get("class") == "figure" and a["viewbox"]]
    assert len(heights) == 5 and max(heights) < 1200


def test_blocks_of_different_kinds_leave_cells_empty(tmp_path: Path) -> None:
    layers = [*make_layers(1), *make_layers(2, ["moe.experts.0.up", "moe.experts.1.up"])[2:]]
    run = begin_run(tmp_path / "mixed", layers)
    add_round(run, 1, "accept", layers)
    page = read_page(run)
    named = [title for title in page.all("title") if title.endswith("%")]
    assert named == [f"{x.name}: {s}.00%" for x, s in zip(layers, (35, 25, 35, 25), strict=True)]


def test_keys_stay_out_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "demo", model="http://me:hidden@host/model")
    monkeypatch.setenv("SOME_API_KEY", "as planned")
    page = write_page([run])
    assert "me:hidden" not in page and "://[key]@host" in page and "as planned" not in page and "because [key]" in page


def test_what_a_trial_left_of_the_facts(tmp_path: Path) -> None:
    layers = make_layers()
    run = begin_run(tmp_path / "asked", layers)
    add_round(run, 1, "accept", layers)
    assert "Answer probability kept" not in read_page(run).page
    add_round(run, 2, "rollback", layers, facts=0.912)
    page = read_page(run)
    assert page.all("dd").count("91.2% ± 0.8% of the dense model's, per token") == 1
