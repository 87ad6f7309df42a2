"""README.md and docs: links lead somewhere, and commands are those of programs that are there.

The command lines need LLMCACHE_BIN_DIR: options are looked up in what the programs say of themselves (--help)."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import unittest
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

from support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_README_LINES = 150
# Programs of others, which are not asked.
OTHERS = {"apt-get", "cmake", "ctest", "cut", "export", "git", "grep", "ldd", "printf", "prometheus", "python3", "venv/bin/pip"}


def anchors(page: Path) -> set[str]:
    """As code hosts make them of headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        text = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
        found.add(text.replace(" ", "-"))
    return found


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(page: Path) -> list[list[str]]:
    """Of ```sh blocks, and of code in the text that calls a program of ours."""
    text = page.read_text(encoding="utf-8")
    lines: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines += re.sub(r"\\\n\s*", " ", block).splitlines()
    in_text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", in_text):
        if re.match(r"(tools/run\.sh|build/(tests/)?bin/llmcache-\S+|build/venv/bin/python) ", code):
            lines.append(re.sub(r"\s+", " ", code))
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        parts: list[list[str]] = [[]]
        for word in words:
            if word in ("&&", "||", "|", ";"):
                parts.append([])
            else:
                parts[-1].append(word)
        for part in parts:
            while part and re.match(r"[A-Z_]+=", part[0]):
                part.pop(0)
            if part:
                found.append(part)
    return found


@cache
def help_of(*program: str) -> str:
    done = subprocess.run([*program, "--help"], check=False, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


class DocsTest(unittest.TestCase):
    def test_the_export_recipe_makes_models_that_can_be_wrapped(self) -> None:
        import transformers

        (recipe,) = re.findall(
            r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        small = {"num_hidden_layers": 2, "n_layer": 2}

        def bert(_name: str, **settings: object) -> object:
            return transformers.BertModel(transformers.BertConfig(**small, hidden_size=48, **settings))

        def gpt2(_name: str, **settings: object) -> object:
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, n_embd=48, **settings))

        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            mock.patch.object(transformers.BertModel, "from_pretrained", bert),
            mock.patch.object(transformers.GPT2LMHeadModel, "from_pretrained", gpt2),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            exec(recipe, {})  # noqa: S102  of our own page
            for name, causal in (("bert.pt", "no"), ("gpt2.pt", "yes")):
                inspect = [str(Path(os.environ["LLMCACHE_BIN_DIR"]) / "llmcache-inspect"), name]
                done = subprocess.run(inspect, check=True, capture_output=True, text=True, timeout=120)
                self.assertRegex(done.stdout, rf"causal: +{causal}\ngranularity: +tokens")

    def test_the_readme_is_a_newcomers_page(self) -> None:
        lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        self.assertLessEqual(len(lines), MOST_README_LINES)

    def test_links_lead_somewhere(self) -> None:
        for page in PAGES:
            for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
                if re.match(r"[a-z]+://", target):
                    continue
                with self.subTest(page=page.name, target=target):
                    file, _, anchor = target.partition("#")
                    there = (page.parent / file).resolve() if file else page
                    self.assertTrue(there.exists(), f"{target} is not there")
                    if anchor:
                        self.assertIn(anchor, anchors(there))

    def test_every_page_is_linked_from_the_readme(self) -> None:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        for page in PAGES[1:]:
            with self.subTest(page=page.name):
                self.assertIn(f"({page.relative_to(ROOT)})", text)

    def test_commands_are_understood(self) -> None:
        binaries = Path(os.environ["LLMCACHE_BIN_DIR"])
        seen = 0
        for page in PAGES:
            for command in commands(page):
                with self.subTest(page=page.name, command=" ".join(command)):
                    seen += self.check(command, binaries)
        self.assertGreater(seen, 20, "no commands were found")

    def check(self, command: list[str], binaries: Path) -> int:
        program, *arguments = command
        if program in OTHERS:
            return 0
        if program == "tools/run.sh":
            self.assertIn(arguments[0], ("bench", "data", "help", "peers", "test"))
            if arguments[0] == "bench":
                return self.options(arguments[1:], help_of(str(binaries / "llmcache-bench")) + " --download")
            if arguments[0] == "peers":
                compare = ROOT / "benchmarks" / "peers" / "compare.py"
                return self.options(arguments[1:], help_of(sys.executable, str(compare)))
            return 1
        if program.startswith(("build/bin/", "build/tests/bin/")):
            binary = binaries / Path(program).name
            self.assertTrue(binary.exists(), f"{program} is not built")
            return self.options(arguments, help_of(str(binary)))
        if program == "build/venv/bin/python" or program.endswith(".py"):
            script = program if program.endswith(".py") else arguments[0]
            if script == "-m":
                return 1
            self.assertTrue((ROOT / script).exists(), f"{script} is not there")
            return self.options(arguments, help_of(sys.executable, str(ROOT / script)))
        if program.endswith(".sh") or program.startswith("./"):
            self.assertTrue((ROOT / program).exists(), f"{program} is not there")
            return 1
        self.fail(f"what is {program}?")

    def options(self, arguments: list[str], known: str) -> int:
        for argument in arguments:
            if argument.startswith("--"):
                name = argument.partition("=")[0]
                self.assertRegex(known, rf"{re.escape(name)}\b", f"no option {name}")
        return 1


if __name__ == "__main__":
    unittest.main()
