#include <llmcache/implementation.h>
