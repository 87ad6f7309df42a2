// Every C++ block in README.md and docs compiles (that this file links shows it), and the complete programs run.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "doc_programs.h"

namespace {

TEST(DocsTest, CompleteProgramsRun) {
  const char* models = std::getenv("LLMCACHE_MODELS_DIR");
  ASSERT_NE(models, nullptr) << "tools/run.sh test sets it";
  ASSERT_GE(doc_programs().size(), 1U);
  for (const DocProgram& program : doc_programs()) {
    SCOPED_TRACE(program.place);
    std::string name = "program";
    std::string model = std::string(models) + "/minilm.pt";
    char* arguments[] = {name.data(), model.data(), nullptr};
    EXPECT_EQ(program.run(2, arguments), 0);
  }
}

}  // namespace
