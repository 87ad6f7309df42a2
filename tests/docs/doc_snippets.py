#!/usr/bin/env python3
"""Makes one C++ file of all `cpp` blocks in README.md and docs: usage: doc_snippets.py OUT.cpp FILE.md...

A block with int main() is a program: it becomes a function that the test can call. Any other block becomes the body of a
function in which the usual names are declared (see PREAMBLE). A block that begins ```cpp no-compile is left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PREAMBLE = """
  [[maybe_unused]] llmcache::TorchScriptCache& cache = *static_cast<llmcache::TorchScriptCache*>(nullptr_of_snippets);
  [[maybe_unused]] std::vector<llmcache::Inputs> sample;
  [[maybe_unused]] at::Tensor input_ids, attention_mask, weight, bias;
  [[maybe_unused]] torch::jit::Module module;
  [[maybe_unused]] std::vector<std::vector<std::int64_t>> sequences, prompts;
"""
BLOCK = re.compile(r"^```cpp([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[int, str]]:
    """Line and text of each block that is to be compiled."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        if "no-compile" not in match[1]:
            found.append((text.count("\n", 0, match.start()) + 2, match[2]))
    return found


def main() -> int:
    out, files = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    includes, functions, programs = {"#include <llmcache/llmcache.h>", "#include <iostream>"}, [], []
    for path in files:
        for line, text in blocks(path):
            includes.update(re.findall(r"^#include [^\n]+", text, re.MULTILINE))
            body = re.sub(r"^#include [^\n]+", "", text, flags=re.MULTILINE)
            name = f"snippet_{re.sub(r'[^a-z0-9]', '_', path.stem.lower())}_{line}"
            where = f'#line {line} "{path}"\n'
            if "int main(" in body:
                body = re.sub(r"int main\(\)", "int main(int, char**)", body)
                body = re.sub(r"}\s*\Z", "  return 0;\n}\n", body)  # as main() does by itself
                programs.append((path.name, line, name))
                functions.append(f"namespace {name} {{\n{where}{body}}}\n".replace("int main(", "int program("))
            else:
                functions.append(f"[[maybe_unused]] void {name}() {{{PREAMBLE}{where}{body}}}\n")
    table = "".join(f'    {{"{file}:{line}", {name}::program}},\n' for file, line, name in programs)
    out.write_text(
        "// Made by doc_snippets.py.\n"
        + "\n".join(sorted(includes))
        + '\n#include "doc_programs.h"\n\nnamespace {\nvoid* nullptr_of_snippets = nullptr;\n\n'
        + "\n".join(functions)
        + "}  // namespace\n\nconst std::vector<DocProgram>& doc_programs() {\n"
        + f"  static const std::vector<DocProgram> programs = {{\n{table}  }};\n  return programs;\n}}\n",
        encoding="utf-8",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
