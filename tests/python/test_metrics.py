"""Metrics for Prometheus: the text that is served, and that dashboard, alerts and docs name what is in it.

Needs LLMCACHE_BIN_DIR with llmcache-metrics, and LLMCACHE_MODELS_DIR."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest
import urllib.request
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Self
from unittest import mock

import yaml
from support import ROOT, ToolTest

from tools.report import dashboard

HEADER = ROOT / "include" / "llmcache" / "metrics" / "prometheus.h"
DASHBOARD = ROOT / "docs" / "metrics" / "dashboard.json"
ALERTS = ROOT / "docs" / "metrics" / "alerts.yml"
OPERATIONS = ROOT / "docs" / "operations.md"
NAME = r"llmcache_[a-z_]+"
# Of caches with tenants' limits, made for an error budget, or once something has fallen back.
NOT_ALWAYS = re.compile(r"llmcache_budget_|llmcache_tenant_|llmcache_fallbacks_total$")

Labels = tuple[tuple[str, str], ...]


@dataclass
class Family:
    kind: str
    help: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)


def parse(text: str) -> dict[str, Family]:
    """The text format 0.0.4, strictly: HELP and TYPE in front of a family's samples, each family and sample once."""
    families: dict[str, Family] = {}
    help_of: tuple[str, str] | None = None
    current = ""
    for line in text.splitlines():
        if found := re.fullmatch(r"# HELP (\S+) (.+)", line):
            help_of = (found[1], found[2])
        elif found := re.fullmatch(r"# TYPE (\S+) (counter|gauge|histogram|summary)", line):
            current = found[1]
            if help_of is None or help_of[0] != current or current in families:
                raise ValueError(f"{line}: without HELP, or for the second time")
            families[current] = Family(found[2], help_of[1])
        else:
            name, labels, value = parse_sample(line)
            parts = families[current].kind in ("histogram", "summary")
            base = re.sub("_(bucket|sum|count)$", "", name) if parts else name
            if base != current or (name, labels) in families[current].samples:
                raise ValueError(f"{line}: in the family {current}, or for the second time")
            families[current].samples[(name, labels)] = value
    return families


def parse_sample(line: str) -> tuple[str, Labels, float]:
    label = r'[a-z_]+="(?:[^"\\\n]|\\[\\n"])*"'
    found = re.fullmatch(rf"([a-z_]+)(?:\{{({label}(?:,{label})*)\}})? (\S+)", line)
    if found is None:
        raise ValueError(f"no sample: {line}")
    labels = tuple(sorted(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', found[2] or "")))
    return found[1], labels, float(found[3])


class Server:
    """llmcache-metrics with a tiny model, on a free port, until its calls are over."""

    def __init__(self, *arguments: str) -> None:
        binary = Path(os.environ["LLMCACHE_BIN_DIR"]) / "llmcache-metrics"
        model = Path(os.environ["LLMCACHE_MODELS_DIR"]) / "tiny-gpt2-sdpa.pt"
        command = [binary, "--model", model, "--listen", "127.0.0.1:0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(re.fullmatch(r"port (\d+), /metrics\n", self.process.stdout.readline())[1])  # type: ignore[index]

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=20) as answer:
            return answer.read().decode("utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@cache
def scrapes() -> list[dict[str, Family]]:
    """While four threads call; the capacity is too small for all that they ask, and a store is below it."""
    settings = ("--seconds", "60", "--threads", "4", "--megabytes", "1", "--tokens", "60", "--texts", "40")
    taken = []
    with tempfile.TemporaryDirectory() as folder, Server(*settings, "--store", folder) as server:
        for _ in range(400):
            families = parse(server.scrape())  # the server has some of its own
            taken.append({name: family for name, family in families.items() if not name.startswith("exposer_")})
            evicted = total(taken[-1], "llmcache_tokens_computed_total", reason="evicted")
            written = total(taken[-1], "llmcache_tier_writes_total", outcome="written")
            if len(taken) >= 30 and min(evicted, written) > 0:
                break
    return taken


def total(families: dict[str, Family], name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (_, own), value in families[name].samples.items() if wanted <= set(own))


def header_names() -> set[str]:
    return set(re.findall(rf'"({NAME})"', HEADER.read_text(encoding="utf-8")))


def known_labels() -> dict[str, set[str]]:
    """By family, of a scrape, and by the header of those that are not in each."""
    found = {name: {"cache"} for name in header_names()}
    found["llmcache_fallbacks_total"].add("mechanism")
    for name, family in scrapes()[-1].items():
        for _, labels in family.samples:
            found[name] |= {key for key, _ in labels}
    return found


def expressions() -> dict[str, str]:
    """By where it stands, each query of the dashboard and of the alerts."""
    found = {}
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']}, {target['refId']}"] = target["expr"]
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            found[rule["alert"]] = rule["expr"]
    return found


class ExpositionTest(unittest.TestCase):
    def test_a_strict_parser_refuses_what_is_wrong(self) -> None:
        good = '# HELP llmcache_a_total text\n# TYPE llmcache_a_total counter\nllmcache_a_total{cache="x"} 1\n'
        self.assertEqual(total(parse(good), "llmcache_a_total", cache="x"), 1)
        for wrong in (
            good + good,
            good + 'llmcache_a_total{cache="x"} 2\n',
            good + 'llmcache_b_total{cache="x"} 2\n',
            good.replace("# HELP llmcache_a_total text\n", ""),
            good.replace('"x"', '"x'),
        ):
            with self.subTest(wrong), self.assertRaises((ValueError, KeyError)):
                parse(wrong)

    def test_every_scrape_adds_up_while_threads_call(self) -> None:
        for families in scrapes():
            requested = total(families, "llmcache_tokens_requested_total")
            reused = total(families, "llmcache_tokens_reused_total")
            computed = total(families, "llmcache_tokens_computed_total")
            self.assertEqual(requested, reused + computed)
            requests = total(families, "llmcache_requests_total")
            self.assertEqual(total(families, "llmcache_sequences_total"), requests, "one row a call")
            count = families["llmcache_request_duration_seconds"].samples
            self.assertEqual(count[("llmcache_request_duration_seconds_count", (("cache", "example"),))], requests)
        self.assertGreater(total(scrapes()[-1], "llmcache_tokens_reused_total"), 0)
        self.assertGreater(total(scrapes()[-1], "llmcache_tokens_computed_total", reason="evicted"), 0)
        self.assertGreater(total(scrapes()[-1], "llmcache_tier_writes_total", outcome="written"), 0)

    def test_counters_never_go_back(self) -> None:
        for before, after in zip(scrapes(), scrapes()[1:], strict=False):
            for name, family in before.items():
                if family.kind == "gauge":
                    continue
                for sample, value in family.samples.items():
                    self.assertGreaterEqual(after[name].samples[sample], value, sample)

    def test_histograms_are_cumulative_and_end_with_all(self) -> None:
        kinds = {name for name, family in scrapes()[-1].items() if family.kind == "histogram"}
        self.assertEqual(len(kinds), 4)
        for name in kinds:
            samples = scrapes()[-1][name].samples
            buckets = {
                float(dict(labels)["le"]): value
                for (full, labels), value in samples.items()
                if full == f"{name}_bucket"
            }
            ordered = [buckets[le] for le in sorted(buckets)]
            self.assertEqual(ordered, sorted(ordered))
            self.assertEqual(buckets[float("inf")], samples[(f"{name}_count", (("cache", "example"),))])

    def test_names_say_kind_and_unit(self) -> None:
        for name, family in scrapes()[-1].items():
            self.assertEqual(family.kind == "counter", name.endswith("_total"), name)
            self.assertEqual(family.kind == "histogram", name.endswith("_seconds"), name)

    def test_all_of_the_header_is_served(self) -> None:
        served = set(scrapes()[-1])
        self.assertEqual(served, {name for name in header_names() if not NOT_ALWAYS.match(name)})


class QueriesTest(unittest.TestCase):
    def test_they_name_metrics_and_labels_that_are_there(self) -> None:
        labels = known_labels()
        histograms = {name for name, family in scrapes()[-1].items() if family.kind == "histogram"}
        self.assertGreater(len(expressions()), 20)
        for place, query in expressions().items():
            with self.subTest(place):
                named = set()
                for full in re.findall(NAME, query):
                    base = re.sub("_(bucket|sum|count)$", "", full)
                    name = base if base in histograms else full
                    self.assertIn(name, labels)
                    self.assertEqual(full == base, name not in histograms, "histograms by their parts")
                    named.add(name)
                self.assertTrue(named)
                used = set(re.findall(r"([a-z_]+)\s*(?:=~|!=|=)\s*\"", query))
                for by in re.findall(r"\bby \(([^)]*)\)", query):
                    used |= {one.strip() for one in by.split(",")}
                there = set.union(*(labels[name] for name in named)) | {"le"}
                self.assertLessEqual(used, there)

    def test_values_of_labels_are_there(self) -> None:
        served = {(key, value) for family in scrapes()[-1].values() for _, own in family.samples for key, value in own}
        for place, query in expressions().items():
            for pair in re.findall(r'(source|reason|bank|outcome)="([^"]*)"', query):
                self.assertIn(pair, served, place)

    def test_counters_are_read_as_rates(self) -> None:
        for place, query in expressions().items():
            for counter in re.finditer(rf"{NAME}_total", query):
                self.assertRegex(query[: counter.start()], r"(rate|increase)\($", place)

    @unittest.skipUnless(shutil.which("promtool"), "promtool is not installed (Debian: prometheus)")
    def test_prometheus_reads_them(self) -> None:
        rules = [{"record": "of:a", "expr": dashboard.expand(query, "30s")} for query in expressions().values()]
        groups = {"groups": [{"name": str(i), "rules": [rule]} for i, rule in enumerate(rules)]}
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
            yaml.safe_dump(groups, file)
            for path in (file.name, str(ALERTS)):
                done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_the_dashboard_is_one(self) -> None:
        whole = json.loads(DASHBOARD.read_text(encoding="utf-8"))
        self.assertEqual(len({panel["id"] for panel in whole["panels"]}), len(whole["panels"]))
        variables = {one["name"] for one in whole["templating"]["list"]}
        used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(whole["panels"]).replace("$__rate_interval", "")))
        self.assertEqual(used, variables)
        for panel in whole["panels"]:
            self.assertTrue(panel["title"] and panel["description"])


class PictureTest(ToolTest):
    def test_variables_and_legends_are_filled_in(self) -> None:
        query = 'sum(rate(llmcache_requests_total{cache=~"$cache"}[$__rate_interval]))'
        self.assertEqual(dashboard.expand(query, "30s"), 'sum(rate(llmcache_requests_total{cache=~".*"}[30s]))')
        self.assertEqual(dashboard.legend("{{bank}}: evicted", {"bank": "outputs"}), "outputs: evicted")

    def test_each_query_is_asked_and_a_picture_comes_out(self) -> None:
        asked = []

        def answer(_server: str, query: str, start: float, end: float, step: float) -> list[dict[str, object]]:
            asked.append(query)
            points = [[start, "1"], [start + step, "NaN"], [end, "2.5"]]
            return [{"metric": {"bank": "outputs", "reason": "new", "source": "prefix"}, "values": points}]

        out = self.folder / "picture.png"
        with mock.patch.object(dashboard, "query_range", answer):
            status, _, err = self.run_tool(dashboard, DASHBOARD, "-o", out)
        self.assertEqual((status, err), (0, ""))
        self.assertTrue(out.read_bytes().startswith(b"\x89PNG"))
        wanted = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
        self.assertEqual(len(asked), sum(len(panel["targets"]) for panel in wanted))

    def test_no_server_is_one_line(self) -> None:
        arguments = (DASHBOARD, "--prometheus", "http://127.0.0.1:1", "-o", self.folder / "picture.png")
        status, _, err = self.run_tool(dashboard, *arguments)
        self.assertEqual(status, 1)
        self.assertRegex(err, r"^dashboard.py: .+\n$")


class DocumentsTest(unittest.TestCase):
    def test_operations_explains_each_metric_and_no_other(self) -> None:
        text = OPERATIONS.read_text(encoding="utf-8")
        self.assertEqual(set(re.findall(rf"`({NAME})`", text)), header_names())

    def test_operations_explains_each_value_of_a_label(self) -> None:
        text = OPERATIONS.read_text(encoding="utf-8")
        for name, key in (("llmcache_tokens_computed_total", "reason"), ("llmcache_tokens_reused_total", "source")):
            for _, labels in scrapes()[-1][name].samples:
                self.assertIn(f"`{dict(labels)[key]}`", text)

    def test_operations_explains_each_alert(self) -> None:
        text = OPERATIONS.read_text(encoding="utf-8")
        for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
            for rule in group["rules"]:
                self.assertIn(f"| `{rule['alert']}` |", text)


if __name__ == "__main__":
    unittest.main()
