"""What the README says in numbers is what its sources say."""

import re
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from linattn.bench.picture import dark
from linattn.cli import COMMANDS

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
SUMMARY, GPU, MODELS, PROCESSOR = re.split(r"\n## (?:On a GPU|Whole models|On a processor)\n", BENCHMARKS)
BESIDE = README.split("\n## Beside others\n")[1].split("\n## ")[0]
SPEED, SEMANTICS = (
    [line for line in part.splitlines() if line.startswith("|")] for part in BESIDE.split("\n### ")[1:]
)
ROADMAP = " ".join(README.split("\n## Roadmap\n")[1].split("\n## ")[0].split())


def fact(name: str) -> str:
    found = re.search(rf"^- {name}: (.+)$", GPU, re.M)
    assert found
    return found[1]


def measured(page: str, *cells: str) -> str:
    """The last cell of the first row that begins with these."""
    found = re.search("^" + re.escape("| " + " | ".join(cells) + " | ") + r"([^|]+) \|", page, re.M)
    assert found, cells
    return found[1]


def test_the_picture_is_named_with_its_machine_date_and_command():
    caption = README.split("</picture>\n")[1].split("## ")[0]
    commit = fact("commit").partition(",")[0]  # what was changed there stands where the link leads
    for said in (fact("GPU").partition(",")[0], fact("date").split()[0], commit, fact("command")):
        assert said in caption, said
    assert "](docs/benchmarks.md#on-a-gpu)" in caption
    assert caption.strip() in (ROOT / "docs" / "index.md").read_text().replace("](", "](docs/")
    assert ("other processes were busy" in caption) == ("too busy" in fact("busy"))


def test_dark_pages_get_the_dark_picture():
    light, shown = Path("docs/benchmarks-forward.png"), MarkdownIt().render(README)
    picture = re.search(r'<picture>(<source [^>]+>)\s*<img src="([^"]+)"[^>]*>\s*</picture>', shown)
    assert picture, "browsers look for a source beside an image that has no other parent"
    assert 'media="(prefers-color-scheme: dark)"' in picture[1] and picture[2] == str(light)
    assert f'srcset="{dark(light)}"' in picture[1] and (ROOT / dark(light)).is_file()


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def of_a_server(case: str, who: str) -> str:
    """Milliseconds of somebody's kernel among those that servers have."""
    rows = GPU.split("\n### Kernels that servers have\n")[1].split(f"| {case} |")[1].splitlines()
    beginning = [f"| {case} |{rows[0]}", *rows[1:]]
    end = next((at for at, row in enumerate(beginning) if at and not row.startswith("| |")), len(beginning))
    (found,) = (cells(row)[2] for row in beginning[:end] if cells(row)[1].startswith(who))
    return found


@pytest.mark.parametrize("row", SPEED[2:], ids=lambda row: cells(row)[0])
def test_times_are_those_of_the_benchmarks(row):
    name, ours, fla, sglang, vllm, _ = cells(row)
    call, shape = name.split(", ")
    alone, _, state = ours.partition("; with state ")
    case = f"{call}, decay per head, {shape}"
    if call == "decode step":
        alone, state, case = "", alone, name
    for ms, who in re.findall(r"([\d.]+) \((\w+)\)", alone):
        label = case + ", cupy" * (who == "CuPy")
        assert measured(GPU, label, f"linattn {who.lower()}") == ms, who
    if fla != "–":
        assert measured(GPU, case, "fla chunk") == fla
    server = name.replace(", ", " ")
    for ms, who in re.findall(r"([\d.]+) \((\w+)\)", state):
        assert of_a_server(server, f"linattn {who.lower()}, bfloat16") == ms, who
    kernel = "linear_decode" if call == "decode step" else "lightning_attention"
    for said, who in ((sglang, "SGLang `seg_la`, bfloat16"), (vllm, f"vLLM `{kernel}`, float32")):
        if said != "–":
            assert of_a_server(server, who) == said.split()[0].rstrip(","), who
            assert ("float32" in said) == ("float32" in who)


def test_models_and_memory_are_those_of_the_benchmarks():
    for what, who, batch, n in (
        ("layer", "MiniMax, patched", 1, 65536),
        ("layer", "MiniMax", 1, 65536),
    ):
        assert f"{measured(MODELS, what, who, str(batch), str(n))} ms" in BESIDE
    for batch, n in ((4, 8192), (1, 32768)):
        for who in ("TransNormerLLM-385M", "Llama-374M, SDPA"):
            ms = measured(MODELS, "training", who, str(batch), str(n))
            rate = measured(MODELS, "training", who, str(batch), str(n), ms)
            peak = measured(MODELS, "training", who, str(batch), str(n), ms, rate)
            assert rate in BESIDE and peak in BESIDE, who
            if n == 8192:
                assert f"{rate} tokens/s, {peak}" in SUMMARY, who
    for who in ("TransNormerLLM-385M", "TransNormerLLM-385M, no graphs", "Llama-374M, SDPA"):
        assert f"in {measured(MODELS, 'generating', who, '1', '1024')}" in BESIDE, who
    extra = re.search(
        r"\| cosformer \| extra memory \| ([^(]+) \([^|]+\| ([^(]+) \([^|]+\| (\S+) ", PROCESSOR
    )
    assert all(size in " ".join(BESIDE.split()) for size in extra.groups()[:2])
    assert "| {} | {} (the released code's arithmetic) | {} |".format(*extra.groups()) in SUMMARY


def test_the_summary_of_the_benchmarks_is_what_they_say():
    forward, both, step = (cells(row) for row in re.findall(r"^\| (?:forward|decode).*$", SUMMARY, re.M))
    shape = re.search(r"(?:\d+ ){3}\d+", forward[0])[0]
    for row, case, column in (
        (forward, f"forward, decay per head, {shape}", 0),
        (both, f"forward + backward, decay per head, {shape}", 0),
        (step, step[0], 1),
    ):
        triton, cupy = (
            measured(GPU, label, f"linattn {who}")
            for label, who in ((case, "triton"), (f"{case}, cupy", "cupy"))
        )
        assert row[1] == f"{triton} ms (Triton), {cupy} ms (CuPy)"
        (found,) = (
            cells(line)
            for line in GPU.splitlines()
            if line.startswith(f"| {case} | ") and line.count("|") == 11
        )
        (other,) = (
            cells(line)
            for line in GPU.splitlines()
            if line.startswith(f"| {case}, cupy | ") and line.count("|") == 11
        )
        if column:
            assert row[2].startswith(f"{found[1]} ms") and row[3].startswith(f"{found[3]} and {other[3]} ")
        else:
            assert row[2].startswith(found[5].split()[0]) and f" {found[6]} times" in row[3]
    met = [re.search(r"^(\d+ of \d+) requirements", part, re.M)[1] for part in (GPU, PROCESSOR)]
    judged = [row for row in MODELS.splitlines() if re.search(r"\| (yes|NO) \|$", row)]
    models = f"{sum(row.endswith('| yes |') for row in judged)} of {len(judged)}"
    said = " ".join(SUMMARY.split())
    assert f"{met[0]} on a GPU, {models} by whole models, {met[1]} on a processor" in said


def test_the_worst_misses_are_those_of_the_benchmarks():
    missed = [cells(row) for row in BENCHMARKS.splitlines() if row.endswith("| NO |")]
    small = []
    for row in missed:
        if len(row) == 3:  # a model's: required, found, met?
            times = row[1].removesuffix(" times")
            assert f"{times} times" in ROADMAP, row
        elif "times as fast" in row[4]:
            assert row[4] in ROADMAP and row[5].split()[2] in ROADMAP, row
        elif len(row) == 10 and float(row[2]) > 1.03 * float(row[8]):
            assert f"takes {row[2]} ms; wanted: {row[8]}" in ROADMAP, row
        else:
            ours, most = (row[2], row[8]) if len(row) == 10 else (row[2].split()[0], row[3].split()[2])
            assert float(ours) <= 1.03 * float(most), row
            small.append(row)
    assert len(small) == 4 and "Four more miss by less than three percent." in ROADMAP


def test_every_row_says_where_it_is_shown():
    for rows in (SPEED, SEMANTICS):
        assert len(rows) > 2
        columns = rows[0].count("|")
        for row in rows[2:]:
            assert row.count("|") == columns, row
            shown = cells(row)[-1]
            assert re.fullmatch(r"\[[^]]+\]\(docs/[^)]+\)(, \[[^]]+\]\(docs/[^)]+\))?", shown), row


@pytest.mark.parametrize(("badge", "says"), [("license", PYPROJECT["license"]), ("python", None)])
def test_badges_are_what_the_package_says(badge, says):
    says = says or f"{PYPROJECT['requires-python'].removeprefix('>=')} or later"
    assert f"![{badge}: {says}](docs/_static/{badge}.svg)" in README
    assert f">{says}</text>" in (ROOT / "docs" / "_static" / f"{badge}.svg").read_text()


def test_every_extra_that_users_install_is_in_the_table():
    named = set(re.findall(r"'\.\[(\w+)\]'", README))
    assert named == set(PYPROJECT["optional-dependencies"]) - {"dev", "docs"}


def test_commands_that_it_names_exist():
    named = set(re.findall(r"^linattn (\w+)|`linattn (\w+)", README, re.M))
    assert {one or other for one, other in named} <= set(COMMANDS)
