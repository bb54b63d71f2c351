"""The decode benchmark on a processor: what it selects, measures, refuses and writes."""

import importlib
import types
from pathlib import Path

import jax
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a file of the benchmark as the script does, by its bare name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the script sets it otherwise
    return importlib.import_module


def test_sets_hold_one_another_and_stay_in_bounds(module):
    shapes = module("decode_shapes")
    goals, standard, full = (shapes.SETS[name]() for name in ("goals", "standard", "full"))
    assert set(goals) < set(standard) < set(full)
    assert 90 <= len(standard) <= 110
    assert len({shape.name for shape in full}) == len(full)
    for shape in full:
        assert 1e6 <= shape.kv_bytes <= 2.2e9, shape
        assert sum(shape.lengths) == shape.B * (shape.S - shape.ragged)
        assert shape.kv_bytes == sum(shape.lengths) * shape.bytes_per_token
        assert max(shape.lengths) <= shape.capacity
        assert 2 * shape.cache_bytes <= 40e9
        if shape.skewed:
            short, long = sorted(shape.lengths)[0], sorted(shape.lengths)[-1]
            assert long / short == pytest.approx(64, rel=0.001)
    ragged = [shape for shape in standard if shape.ragged]
    assert [shape.name for shape in ragged] == [
        f"B{of}-bf16-ragged57"
        for of in ("64-S8192-N16-K1-H128", "256-S512-N16-K1-H128", "16-S8192-N32-K8-H128")
    ]
    for shape in ragged:
        assert {length % 8 for length in shape.lengths} == {7}
        assert (shape.capacity, shape.full) == (shape.S, False)
    with pytest.raises(ValueError, match="ragged 64: expected 1 to S - 1"):
        shapes.Shape(2, 64, 4, 1, 16, ragged=64)
    mqa = shapes.Shape(64, 8192, 16, 1, 128)
    assert mqa.kv_bytes == 64 * 8192 * 128 * 2 * 2
    assert shapes.Shape(64, 8192, 16, 1, 128, "int8").kv_bytes == 64 * 8192 * 2 * (128 + 4)
    assert shapes.layers_of(mqa, 180_000_000, 96, 40_000_000_000) == 2
    assert shapes.layers_of(mqa, 180_000_000, 96, mqa.cache_bytes) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke"], "--out is missing"),
        (["--processes", "0"], "--processes 0: expected 1 or more"),
        (["--only", "B65-*"], "'B65-*' matches none"),
        (["--implementations", "cudn"], "the nearest is 'cudnn'"),
        (["--from", "no/such.csv"], "no/such.csv: no such file"),
    ],
)
def test_says_what_is_wrong_before_any_work(module, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        module("decode_attention").main(arguments)
    assert message in capsys.readouterr().err


def test_measures_catches_what_fails_and_goes_on(module, tmp_path, monkeypatch, capsys):
    main, timing = module("decode_attention").main, module("decode_timing")
    right = timing.decode_attention

    def some_fail(q, k, v, lengths, *, implementation, **scales):
        if implementation == "cudnn":
            raise NotImplementedError("not today")
        out = right(q, k, v, lengths, implementation="xla", **scales)
        return out * 1.1 if implementation == "mosaic_gpu" else out

    monkeypatch.setattr(timing, "decode_attention", some_fail)
    arguments = ["--smoke", "--out", str(tmp_path), "--only", "B3-S96-*", "--implementations"]
    assert main([*arguments, "xla", "cudnn", "mosaic_gpu"]) == 0
    report = module("decode_report")
    rows = {row.implementation: row for row in report.read(tmp_path / "results.csv")}
    assert rows["cudnn"].note == "NotImplementedError: not today"
    assert rows["cudnn"].microseconds is None
    assert rows["mosaic_gpu"].note.startswith("wrong (error ")
    assert rows["mosaic_gpu"].microseconds is None
    xla = rows["xla"]
    assert xla.error < 3e-3
    assert xla.default == "xla"
    assert xla.microseconds * 1e-6 * xla.tb_per_second * 1e12 == pytest.approx(
        xla.shape.kv_bytes, rel=0.01
    )
    for name in ("results.md", "bandwidth.png", "bandwidth.svg"):
        assert (tmp_path / name).exists() == (name == "results.md")  # skewed rows are not drawn

    capsys.readouterr()
    # Another run died there; this one has time for nothing.
    (tmp_path / "running").write_text(f"{xla.shape.name} flashinfer\n")
    assert main([*arguments, "xla", "reference", "--deadline", "0"]) == 0
    said = capsys.readouterr().out
    assert "1 rows to measure, 4 there already" in said
    assert "stopped after 0 s" in said
    *before, died = report.read(tmp_path / "results.csv")
    assert before == list(rows.values())
    assert (died.implementation, died.note[:13]) == ("flashinfer", "the run ended")


@pytest.mark.slow
def test_processes_share_the_shapes(module, tmp_path, capfd):
    arguments = ["--smoke", "--out", str(tmp_path), "--implementations", "xla", "reference"]
    assert module("decode_attention").main([*arguments, "--processes", "2"]) == 0
    report, shapes = module("decode_report"), module("decode_shapes").smoke_shapes()
    rows = report.read(tmp_path / "results.csv")
    assert sorted((row.shape.name, row.implementation) for row in rows) == sorted(
        (shape.name, name) for shape in shapes for name in ("xla", "reference")
    )
    assert all(row.microseconds for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir())[-2:] == ["results.csv", "results.md"]
    said = capfd.readouterr().out
    assert "# 2 shapes, 4 rows to measure" in said
    assert "# 1 shapes, 2 rows to measure" in said
    assert said.count("(sum of float32)") == 1  # one process reads the bandwidth for both
    assert len({row.ceiling_tb_per_second for row in rows}) == 1


def fake_rows(report, shapes):
    """Ours twice as fast as cuDNN on one shape, at half its speed on another."""
    fast, slow = shapes.Shape(64, 8192, 16, 1, 128), shapes.Shape(1, 8192, 16, 1, 64)
    given = [
        (fast, "mosaic_gpu", 60.0, ""), (fast, "cudnn", 120.0, ""), (fast, "flashinfer", 75.0, ""),
        (slow, "mosaic_gpu", 20.0, ""), (slow, "cudnn", 10.0, ""),
        (slow, "flashinfer", None, "wrong (error 1.0e+00)"),
    ]  # fmt: skip
    return [
        report.Row(
            shape, name, default="mosaic_gpu", layers=2, microseconds=time, windows=60, clean=2,
            agreed=name != "flashinfer", ceiling_tb_per_second=4.5,
            tb_per_second=time and shape.kv_bytes / time / 1e6,
            fraction=time and shape.kv_bytes / time / 4.5e6, error=2e-3, device="GPU", note=note,
        )
        for shape, name, time, note in given
    ]  # fmt: skip


def test_table_summary_and_figure_of_a_saved_run(module, tmp_path, capsys):
    report, shapes = module("decode_report"), module("decode_shapes")
    saved = tmp_path / "results.csv"
    for row in fake_rows(report, shapes):
        report.append(saved, row)
    with saved.open("a") as file:
        file.write("B64-S8192-N16-K1-H128-bf16,64,81")  # killed while it wrote
    assert module("decode_attention").main(["--from", str(saved), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "line 8: not a whole row, passed over" in said
    text = (tmp_path / "results.md").read_text()
    assert text in said
    assert (
        "| B64-S8192-N16-K1-H128-bf16 | 268.4 | **60.0** | 120.0 | 75.0 | mosaic_gpu | 0.99 |"
        in text
    )
    assert "| 20.0 | **10.0** | wrong | mosaic_gpu |" in text
    assert "against cudnn: 1.00 times as fast in the geometric mean of 2 shapes" in text
    assert "fastest JAX path on 50.0% of 2 shapes; not on:" in text
    assert "B1-S8192-N16-K1-H64-bf16 (cudnn is 2.00 times as fast)" in text
    assert "against flashinfer: 1.25 times as fast in the geometric mean of 1 shape;" in text
    assert "(no three windows agreed):\n* B64-S8192-N16-K1-H128-bf16, flashinfer: 75.0" in text
    for name in ("bandwidth.png", "bandwidth.svg"):
        assert (tmp_path / name).stat().st_size > 1000


def test_a_table_of_an_earlier_version_is_read_but_not_added_to(module, tmp_path, capsys):
    report, shapes = module("decode_report"), module("decode_shapes")
    saved = tmp_path / "results.csv"
    before = [name for name in report.COLUMNS if name not in report._LATER]
    before.insert(14, "spread")
    values = dict.fromkeys(before, "") | {
        "name": "B2-S64-N4-K1-H16-bf16", "B": "2", "S": "64", "N": "4", "K": "1", "H": "16",
        "dtype": "bf16", "skewed": "False", "layers": "3", "microseconds": "7.5", "spread": "0.1",
        "implementation": "xla",
    }  # fmt: skip
    saved.write_text(",".join(before) + "\n" + ",".join(values.values()) + "\n")
    (row,) = report.read(saved)
    assert (row.shape, row.microseconds) == (shapes.Shape(2, 64, 4, 1, 16), 7.5)
    assert (row.agreed, row.windows) == (None, None)
    with pytest.raises(SystemExit, match="2"):
        module("decode_attention").main(["--smoke", "--out", str(tmp_path)])
    assert "not those of this version; expected a new folder" in capsys.readouterr().err


class Clock:
    """Of a device that takes a millisecond for each piece of work, beside a host that disturbs."""

    def __init__(self, disturbed):
        self.now, self.calls, self.disturbed = 0.0, 0, disturbed

    def perf_counter(self):
        return self.now

    def work(self, n):
        self.calls += 1
        self.now += 2e-4 + n * 1e-3 + self.disturbed(self.calls)


@pytest.mark.parametrize(
    ("disturbed", "agreed", "within"),
    [
        (lambda call: 0.0, True, 1e-9),
        # A slice of another process in nine windows of ten.
        (lambda call: 0.0 if call % 10 in (0, 3) else 4e-3, True, 1e-9),
        # Never the same twice, so that nothing tells which is right.
        (lambda call: 3e-4 * (call * 7 % 61), False, 0.5),
    ],
)
def test_the_shortest_windows_count_and_say_whether_they_agree(
    module, monkeypatch, disturbed, agreed, within
):
    timing, clock = module("decode_timing"), Clock(disturbed)
    monkeypatch.setattr(timing, "time", clock)
    found = timing.slope(clock.work, 10, timing.Timing())
    assert found.seconds == pytest.approx(1e-4, rel=within)
    assert found.agreed is agreed
    assert 3 <= found.windows <= 60
    assert (found.windows == 3) == (disturbed(1) == disturbed(2) == 0)
    assert 1 <= found.clean <= found.windows


def test_what_was_disturbed_is_measured_once_more(module, tmp_path, monkeypatch, capsys):
    timing, report = module("decode_timing"), module("decode_report")
    times = iter([timing.Measured(9e-6, False, 60, 1), timing.Measured(7e-6, False, 60, 2)])
    monkeypatch.setattr(timing, "slope", lambda *_: next(times))
    monkeypatch.setattr(timing, "read_bandwidth", lambda *_: {"all of it": 1e12})
    arguments = ["--smoke", "--out", str(tmp_path), "--only", "B2-S64-*", "--implementations"]
    assert module("decode_attention").main([*arguments, "xla"]) == 0
    said = capsys.readouterr().out
    assert "disturbed, measured again: 1" in said
    assert "xla: 7.0 us, 2 of 60 windows within 1 % of the shortest" in said
    (row,) = report.read(tmp_path / "results.csv")
    assert (row.microseconds, row.agreed) == (7.0, False)
    run = module("decode_run").Run(tmp_path, timing.Timing(), 0.0, 1e12, "", timed={row.key})
    run.record(report.Row(row.shape, "xla", note="no answer"))
    assert report.read(tmp_path / "results.csv") == [row]
    run.record(report.Row(row.shape, "xla", error=0.5, note="wrong"))
    assert report.read(tmp_path / "results.csv")[0].note == "wrong"
    assert module("decode_attention").to_do([row.shape], ["xla"], [row], retry=False) == []
    assert module("decode_attention").to_do([row.shape], ["xla"], [row], retry=True)


def test_later_rows_replace_earlier_ones_and_retry_wants_those_without_a_time(module, tmp_path):
    report, shapes = module("decode_report"), module("decode_shapes")
    rows = fake_rows(report, shapes)
    for row in [*rows, report.Row(rows[0].shape, "mosaic_gpu", note="broken since")]:
        report.append(tmp_path / "results.csv", row)
    read = report.read(tmp_path / "results.csv")
    assert len(read) == len(rows)
    chosen = [rows[0].shape, rows[3].shape]
    to_do = module("decode_attention").to_do
    names = ["mosaic_gpu", "flashinfer"]
    assert to_do(chosen, names, read, retry=False) == []
    assert to_do(chosen, names, read, retry=True) == [
        (chosen[0], names), (chosen[1], ["flashinfer"])  # the first's peer was disturbed
    ]  # fmt: skip


@pytest.mark.slow
def test_the_tuner_checks_two_cuts_in_the_interpreter(module, capsys):
    tune = module("tune_decode")
    tune.main(tune.Options(smoke=True))
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[2:]] == ["table", "64x4x1", "64x4x2"]
    assert said.count("not timed") == 3
    assert "wrong" not in said


def test_the_tuner_times_right_cuts_in_turns_and_ranks_them(module, monkeypatch):
    tune, timing = module("tune_decode"), module("decode_timing")
    shape = module("decode_shapes").Shape(2, 136, 4, 1, 64)
    attend, calls = timing.attend, []

    def on_a_processor(how, *args):
        if how == "cudnn":
            raise ValueError("not here")
        out = attend("xla", *args)
        return 1.1 * out if getattr(how, "workers", 1) == 2 else out

    def slope(run, *_):
        run(1)
        calls.append(run)
        return timing.Measured(next(times), True, 3, 3)

    times = iter([4e-6, 2e-6, 5e-6, 3e-6, 4e-6, 2e-6])
    monkeypatch.setattr(timing, "attend", on_a_processor)
    monkeypatch.setattr(timing, "slope", slope)
    options = tune.Options(blocks=(64,), stages=(4,), rounds=3)
    cuts = tune.fitting(shape, tune.grid(options))
    assert {name: cut.units for name, cut in cuts.items()} == {"64x4x1": 6, "64x4x2": 6}
    contestants = {"table": "mosaic_gpu", "cudnn": "cudnn", **cuts}
    few = timing.Timing(1e-4, rotation=40_000, most_layers=2, step=2, rate=1e9)
    found = tune.contest(shape, contestants, few, rounds=3, threads=2)
    assert found["cudnn"].note == "not here"
    assert found["64x4x2"].note == "wrong"
    assert found["table"].seconds == (4e-6, 5e-6, 4e-6)  # in turns
    assert found["64x4x1"].seconds == (2e-6, 3e-6, 2e-6)
    assert "     2.00 us (2.00 to 3.00)  2.000 of the table's speed" in tune.table(shape, found)
    said = tune.verdict("16 bits", [found, found])
    assert said[0] == "16 bits, 2 shapes: 64x4x1 is faster"
    assert said[1].split() == ["64x4x1", "2.000", "(at", "least", "2.000)"]
    slower = {**found, "64x4x1": tune.Found(1e-3, (8e-6,))}
    assert "the table's cut stands" in tune.verdict("16 bits", [found, slower])[0]


def test_the_tuner_says_what_is_wrong_before_any_work(module, monkeypatch):
    tune = module("tune_decode")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="cpu")])
    for change, message in (
        ({"shapes": ("B65-*",)}, "'B65-\\*' matches none"),
        ({"blocks": (96,)}, "block 96: expected a positive multiple of 64"),
        ({"stages": (6,), "workers": (2,)}, "nothing to time"),
        ({}, "finds a cpu and no GPU; --smoke runs here"),
    ):
        with pytest.raises(ValueError, match=message):
            tune.main(tune.Options(**change))


def test_the_tuner_has_several_shapes_of_every_entry(module):
    from cla_kernels._tuning import table_entry

    tune, shapes = module("tune_decode"), module("decode_shapes")
    chosen = shapes.select(shapes.standard_shapes(), tune.SHAPES)
    assert len(chosen) == len(tune.SHAPES)
    dtypes = module("decode_timing").DTYPES
    entries = {(table_entry(s.H, dtypes[s.dtype])[0], s.dtype == "bf16") for s in chosen}
    assert len(entries) == 6
