// The main program of every test executable.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <iostream>
#include <string>
#include <string_view>

namespace llmcache::test {

/// A filter for the tests that stand in the source file `file`, without those that `others` leaves out ("-Zoo/*").
inline std::string filter_of_file(std::string_view file, const std::string& others) {
  std::string filter;
  const auto& unit = *::testing::UnitTest::GetInstance();
  for (int s = 0; s < unit.total_test_suite_count(); ++s) {
    const auto& suite = *unit.GetTestSuite(s);
    for (int t = 0; t < suite.total_test_count(); ++t) {
      const auto& test = *suite.GetTestInfo(t);
      if (!std::string_view(test.file()).ends_with(file)) continue;
      filter.append(filter.empty() ? "" : ":").append(suite.name()).append(".").append(test.name());
    }
  }
  if (!filter.empty() && !others.empty() && others.front() == '-') filter += others;
  return filter;
}

/// Runs the tests. `--file=reuse/prefix_test.cpp`: those of this source file only. That none was found is a failure.
inline int run_tests(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  constexpr std::string_view kFile = "--file=";
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (!argument.starts_with(kFile)) {
      std::cerr << "unknown argument " << argument << '\n';
      return 1;
    }
    const std::string filter = filter_of_file(argument.substr(kFile.size()), GTEST_FLAG_GET(filter));
    GTEST_FLAG_SET(filter, filter.empty() ? "-*" : filter);
  }
  const int status = RUN_ALL_TESTS();
  if (!GTEST_FLAG_GET(list_tests) && ::testing::UnitTest::GetInstance()->test_to_run_count() == 0) {
    std::cerr << "no test has a name that was asked for\n";
    return 1;
  }
  return status;
}

}  // namespace llmcache::test
