// PrefixTree against a plain set of prefixes; limits of memory. No model and no LibTorch.
#include "match/prefix_tree.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <memory_resource>
#include <new>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace llmcache::test {
namespace {

using Tokens = std::vector<std::int64_t>;
using Match = PrefixTree::Match;
constexpr std::uint32_t kNone = PrefixTree::kNone;

/// Counts what is held, and refuses allocations when told to.
class LimitedMemory final : public std::pmr::memory_resource {
 public:
  /// Refuses allocation number `count` from now on, and all after it.
  void fail_after(std::size_t count) { left_ = count; }
  void allow() { left_ = std::numeric_limits<std::size_t>::max(); }
  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (left_ == 0) throw std::bad_alloc();
    --left_;
    used_ += bytes;
    return ::operator new (bytes, std::align_val_t{alignment});
  }
  void do_deallocate(void* pointer, std::size_t bytes, std::size_t alignment) override {
    used_ -= bytes;
    ::operator delete (pointer, std::align_val_t{alignment});
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

  std::size_t left_ = std::numeric_limits<std::size_t>::max();
  std::size_t used_ = 0;
};

Tokens part(const Tokens& tokens, std::size_t begin, std::size_t end) {
  return {tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.begin() + static_cast<std::ptrdiff_t>(end)};
}

/// Makes a sequence known the way a bank does. Returns where it ends. May throw; then some steps may be done.
std::uint32_t add(PrefixTree& tree, const std::string& partition, const Tokens& tokens, std::size_t width = 1) {
  const Match match = tree.match(partition, tokens);
  if (match.tokens * width == tokens.size()) return match.node;
  std::uint32_t node = match.node == kNone ? tree.root(partition) : match.node;
  if (!tree.is_root(node) && match.in_node < tree.size(node)) node = tree.split(node, match.in_node);
  return tree.attach(node, part(tokens, match.tokens * width, tokens.size()));
}

class PrefixTrees : public ::testing::Test {
 protected:
  LimitedMemory memory_;
  PrefixTree tree_{1, &memory_};

  void expect_match(const Tokens& tokens, std::size_t length, std::size_t in_node) {
    const Match match = tree_.match("s", tokens);
    EXPECT_EQ(match.tokens, length);
    EXPECT_EQ(match.in_node, in_node);
  }
};

TEST_F(PrefixTrees, EmptyTakesNothing) {
  EXPECT_EQ(tree_.match("", {}).node, kNone);
  EXPECT_EQ(tree_.match("s", Tokens{1, 2}).node, kNone);
  tree_.drop_if_empty("s");
  EXPECT_TRUE(tree_.empty());
  EXPECT_EQ(memory_.used(), 0U);
}

TEST_F(PrefixTrees, MatchesAnyPartOfANode) {
  add(tree_, "s", {1, 2, 3, 4});
  expect_match({}, 0, 0);
  expect_match({1}, 1, 1);
  expect_match({1, 2, 3}, 3, 3);
  expect_match({1, 2, 9}, 2, 2);
  expect_match({1, 2, 3, 4}, 4, 4);
  expect_match({1, 2, 3, 4, 5}, 4, 4);
  expect_match({2}, 0, 0);
  EXPECT_EQ(tree_.match("t", Tokens{1, 2}).node, kNone) << "another partition";
  EXPECT_EQ(tree_.match("", Tokens{1, 2}).node, kNone) << "another partition";
}

TEST_F(PrefixTrees, TokensOfSeveralNumbersAreComparedWhole) {
  PrefixTree tree(2, &memory_);
  add(tree, "s", {1, 10, 2, 20, 3, 30}, 2);
  EXPECT_EQ(tree.match("s", Tokens{1, 10, 2, 20, 3, 30}).tokens, 3U);
  EXPECT_EQ(tree.match("s", Tokens{1, 10, 2, 21, 3, 30}).tokens, 1U) << "half a token in common";
  EXPECT_EQ(tree.match("s", Tokens{1, 11}).tokens, 0U);
  EXPECT_EQ(tree.match("s", Tokens{10, 1}).tokens, 0U);
  add(tree, "s", {1, 10, 2, 21}, 2);
  EXPECT_EQ(tree.match("s", Tokens{1, 10, 2, 21}).in_node, 1U);
  EXPECT_EQ(tree.match("s", Tokens{1, 10, 2, 20, 3, 30}).in_node, 2U);
}

TEST_F(PrefixTrees, ASplitKeepsSlotAndChildrenOfTheLowerHalf) {
  const std::uint32_t first = add(tree_, "s", {1, 2, 3, 4});
  const std::uint32_t below = add(tree_, "s", {1, 2, 3, 4, 5});
  const std::uint32_t beside = add(tree_, "s", {9});
  const std::uint32_t upper = tree_.split(first, 1);
  EXPECT_EQ(tree_.parent(below), first);
  EXPECT_EQ(tree_.parent(first), upper);
  EXPECT_TRUE(tree_.is_root(tree_.parent(upper)));
  EXPECT_EQ(tree_.first_child(tree_.parent(upper)), upper);
  EXPECT_EQ(tree_.next_sibling(upper), beside);
  EXPECT_EQ(tree_.first_child(upper), first);
  EXPECT_EQ(tree_.next_sibling(first), kNone);
  EXPECT_EQ(tree_.size(upper), 1U);
  EXPECT_EQ(tree_.size(first), 3U);
  EXPECT_EQ(tree_.match("s", Tokens{1, 2, 3, 4, 5}).node, below);
  EXPECT_EQ(tree_.match("s", Tokens{1, 7}).node, upper);
  EXPECT_EQ(tree_.match("s", Tokens{9}).node, beside);
}

TEST_F(PrefixTrees, ALeafGrows) {
  const std::uint32_t leaf = add(tree_, "s", {1, 2});
  tree_.extend(leaf, Tokens{3, 4});
  EXPECT_EQ(tree_.size(leaf), 4U);
  expect_match({1, 2, 3, 4}, 4, 4);
}

TEST_F(PrefixTrees, TheLastChildTakesTheRootWithIt) {
  const std::uint32_t one = add(tree_, "s", {1});
  const std::uint32_t two = add(tree_, "s", {2});
  const std::uint32_t other = add(tree_, "t", {1});
  tree_.remove(one);
  expect_match({1}, 0, 0);
  expect_match({2}, 1, 1);
  tree_.remove(two);
  EXPECT_EQ(tree_.match("s", Tokens{2}).node, kNone);
  EXPECT_EQ(tree_.match("t", Tokens{1}).node, other);
  tree_.remove(other);
  EXPECT_TRUE(tree_.empty());
  EXPECT_EQ(memory_.used(), 0U);
}

TEST_F(PrefixTrees, SlotsAreUsedAgain) {
  for (std::int64_t i = 0; i < 1000; ++i) {
    add(tree_, "s", {1, i});
    tree_.remove(tree_.match("s", Tokens{1, i}).node);
    if (i % 7 == 6) tree_.clear();
  }
  EXPECT_LE(tree_.slots(), 8U);
}

TEST_F(PrefixTrees, AHundredThousandChildren) {
  constexpr std::int64_t kChildren = 100000;
  for (std::int64_t i = 0; i < kChildren; ++i) add(tree_, "s", {i, -i});
  for (std::int64_t i = 0; i < kChildren; ++i) ASSERT_EQ(tree_.match("s", Tokens{i, -i}).tokens, 2U) << i;
  expect_match({kChildren}, 0, 0);
  for (std::int64_t i = 0; i < kChildren; ++i) tree_.remove(tree_.match("s", Tokens{i}).node);
  EXPECT_EQ(memory_.used(), 0U);
}

/// All prefixes of what is known, by partition.
using Known = std::map<std::string, std::set<Tokens>>;

std::size_t longest(const Known& known, const std::string& partition, const Tokens& tokens) {
  const auto it = known.find(partition);
  if (it == known.end()) return 0;
  std::size_t length = 0;
  while (length < tokens.size() && it->second.count(part(tokens, 0, length + 1)) != 0) ++length;
  return length;
}

TEST_F(PrefixTrees, AgainstASetOfPrefixes) {
  std::mt19937_64 random(1);
  const auto below = [&random](std::uint64_t n) { return random() % n; };
  Known known;
  for (int step = 0; step < 20000; ++step) {
    const std::string partition(1, static_cast<char>('a' + below(3)));
    Tokens tokens(1 + below(10));
    for (auto& token : tokens) token = static_cast<std::int64_t>(below(3));
    const Match match = tree_.match(partition, tokens);
    ASSERT_EQ(match.tokens, longest(known, partition, tokens)) << "step " << step;
    ASSERT_EQ(match.node == kNone, known.count(partition) == 0) << "step " << step;
    if (below(4) != 0) {
      if (below(3) == 0 && match.tokens > 0 && tree_.is_leaf(match.node) && match.in_node == tree_.size(match.node)) {
        tree_.extend(match.node, part(tokens, match.tokens, tokens.size()));
      } else {
        add(tree_, partition, tokens);
      }
      for (std::size_t end = 1; end <= tokens.size(); ++end) known[partition].insert(part(tokens, 0, end));
    } else if (match.tokens > 0 && tree_.is_leaf(match.node)) {
      // All of the leaf goes: what begins with the match, back to where the leaf begins.
      const std::size_t begin = match.tokens - match.in_node;
      auto& prefixes = known[partition];
      for (auto it = prefixes.lower_bound(part(tokens, 0, match.tokens)); it != prefixes.end();) {
        if (!std::equal(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(match.tokens), it->begin(),
                        it->begin() + static_cast<std::ptrdiff_t>(std::min(match.tokens, it->size())))) {
          break;
        }
        it = prefixes.erase(it);
      }
      for (std::size_t end = begin + 1; end <= match.tokens; ++end) prefixes.erase(part(tokens, 0, end));
      if (prefixes.empty()) known.erase(partition);
      tree_.remove(match.node);
    }
    if (step % 5000 == 4999) {
      tree_.clear();
      known.clear();
      ASSERT_EQ(memory_.used(), 0U);
    }
  }
}

TEST_F(PrefixTrees, NothingHasChangedAfterAFailure) {
  std::mt19937_64 random(2);
  const auto below = [&random](std::uint64_t n) { return random() % n; };
  Known known;
  std::size_t failures = 0;
  for (int step = 0; step < 3000; ++step) {
    const std::string partition = "a name that is too long to be kept in place " + std::to_string(below(3));
    Tokens tokens(1 + below(8));
    for (auto& token : tokens) token = static_cast<std::int64_t>(below(4));
    bool done = false;
    for (std::size_t allowed = 0; !done; ++allowed) {
      memory_.fail_after(allowed);
      try {
        add(tree_, partition, tokens);
        done = true;
      } catch (const std::bad_alloc&) {
        ++failures;
        tree_.drop_if_empty(partition);
      }
      memory_.allow();
      if (!done) {
        ASSERT_EQ(tree_.match(partition, tokens).tokens, longest(known, partition, tokens)) << "step " << step;
        ASSERT_EQ(tree_.match(partition, tokens).node == kNone, known.count(partition) == 0) << "step " << step;
      }
    }
    for (std::size_t end = 1; end <= tokens.size(); ++end) known[partition].insert(part(tokens, 0, end));
    if (step % 50 == 49) {
      for (const auto& [name, prefixes] : known) {
        for (const Tokens& prefix : prefixes) ASSERT_EQ(tree_.match(name, prefix).tokens, prefix.size());
      }
      // Leaf by leaf.
      for (const auto& [name, prefixes] : known) {
        for (const Tokens& prefix : prefixes) {
          for (Match match; match = tree_.match(name, prefix), match.tokens > 0;) {
            std::uint32_t node = match.node;
            while (!tree_.is_leaf(node)) node = tree_.first_child(node);
            tree_.remove(node);
          }
        }
      }
      known.clear();
      ASSERT_TRUE(tree_.empty());
      ASSERT_EQ(memory_.used(), 0U);
    }
  }
  EXPECT_GT(failures, 3000U);
}

TEST_F(PrefixTrees, AFailedExtensionLeavesTheLeaf) {
  const std::uint32_t leaf = add(tree_, "s", {1, 2});
  const std::size_t used = memory_.used();
  memory_.fail_after(0);
  EXPECT_THROW(tree_.extend(leaf, Tokens(100, 3)), std::bad_alloc);
  EXPECT_EQ(memory_.used(), used);
  expect_match({1, 2, 3}, 2, 2);
}

}  // namespace
}  // namespace llmcache::test
