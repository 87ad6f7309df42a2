// The complete programs that stand in README.md and docs, as functions (doc_snippets.py).
#pragma once

#include <string>
#include <vector>

struct DocProgram {
  std::string place;  ///< file and line
  int (*run)(int argc, char** argv);
};

const std::vector<DocProgram>& doc_programs();
