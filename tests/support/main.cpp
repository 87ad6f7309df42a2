// The main program of tests that run no exported model.
#include "run_tests.h"

int main(int argc, char** argv) { return llmcache::test::run_tests(argc, argv); }
