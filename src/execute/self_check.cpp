#include "execute/self_check.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <optional>

#include "execute/batch.h"
#include "execute/engine.h"
#include "execute/padding_ids.h"
#include "llmcache/error.h"
#include "match/size_class.h"
#include "model/tensors_of.h"
#include "refresh/verification.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

constexpr std::int64_t kLong = kLongProbe;

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  if (at::equal(a, b)) return true;
  if (!at::isFloatingType(a.scalar_type())) return false;
  const auto nan = a.isnan();
  return at::equal(nan, b.isnan()) && at::equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0));
}

class Checker {
 public:
  /// `shallow` may be null.
  Checker(const Model& model, const Model* shallow, const InputSpec& input_spec, const OutputSpec& spec,
          ModelProfile& profile)
      : model_(model),
        spec_(spec),
        whole_{model_, spec_},
        few_{shallow == nullptr ? model_ : *shallow, shallow == nullptr ? spec_ : states_},
        input_spec_(input_spec),
        profile_(profile) {}

  /// `runs` have up to three rows.
  void run(std::vector<PlainRun> runs) {
    const bool enough = std::ranges::any_of(runs, [](const PlainRun& run) { return run.tokens == kLong; });
    if (!enough) add_short_and_long(runs);
    for (const PlainRun& plain : runs) compare_whole_layers(plain);
    verified(Kind::kDenseLength, kLong);
    verified(Kind::kDenseRows, 3);
    profile_.verified.tokens = kLong;
    profile_.verified.rows = 3;
    if (profile_.rows_independent) {      // probing compared rows alone and among others
      constexpr std::uint8_t kEight = 3;  // of nine rows, and of 14 tokens
      for (std::uint8_t a = 0; a <= kEight; ++a) {
        for (std::uint8_t b = 0; b <= kEight; ++b) {
          profile_.verified.codes.push_back(SizeCode(Kind::kMatchRows, a, b).number());
          profile_.verified.codes.push_back(SizeCode(Kind::kMatchLength, a, b).number());
        }
      }
    }
    const TokenLevelModel* token_level = model_.token_level();
    if (token_level == nullptr) return;
    profile_.head_tokenwise = token_level->head_tokenwise();
    if (!profile_.rows_independent) {
      note(profile_.per_row_output ? "a sequence's output depends on the rest of its batch"
                                   : "the result is not made of one entry a sequence");
      return;
    }
    if (!packed(runs)) return;
    profile_.granularity = Granularity::kPacked;
    const bool masked = profile_.mask_argument >= 0;
    verified(Kind::kPackedLength, masked ? kLong + 1 : 5);
    verified(Kind::kPackedRows, masked ? 4 : 2);
    if (masked) verified(Kind::kPadding, kPadded);
    if (profile_.left_padding) verified(Kind::kLeftPadding, 6);
    profile_.verified.padding = masked ? kPadded : 0;
    if (token_level->partial() && partial()) profile_.granularity = Granularity::kTokens;
  }

  /// One ragged batch, plain and as it will be run.
  c10::IValue run_once() {
    constexpr std::int64_t kWidth = 5;
    const bool masked = profile_.mask_argument >= 0;
    const Spans spans{{0, kWidth}, {0, masked ? 3 : kWidth}};
    const auto given = inputs(spans, kWidth, 3);
    auto plain = model_.plain(given);
    if (plain.isNone()) return plain;
    check_shapes(plain, static_cast<std::int64_t>(spans.size()), kWidth);
    if (profile_.granularity == Granularity::kWholeLayers) {
      const auto want = tensors_of(plain);
      const auto got = tensors_of(run_dense(model_, given));
      bool same = want.size() == got.size();
      for (std::size_t i = 0; same && i < want.size(); ++i) same = same_bits(want[i], got[i]);
      if (!same) throw DamagedData("with it the layers give another result than the model");
      return plain;
    }
    ForwardReport report;
    const auto packed = execute_packed(model_, given, plan(whole_, spans, kWidth), {}, nullptr, report);
    if (!agrees(whole_, packed, plain, spans, kWidth)) {
      throw DamagedData("with it packed rows give another result than the plain model");
    }
    return plain;
  }

 private:
  static constexpr std::int64_t kPadded = 17;  ///< places of padding behind the row that has most
  using Spans = std::vector<RowSpan>;
  using Kind = SizeCode::Kind;
  /// What is compared with its own plain passes.
  struct Subject {
    const Model& model;
    const OutputSpec& spec;
  };

  /// Is a result as the output's description says?
  void check_shapes(const c10::IValue& result, std::int64_t rows, std::int64_t padded_length) const {
    const auto leaves = tensors_of(result);
    bool fits = leaves.size() == spec_.leaves.size();
    for (std::size_t i = 0; fits && i < leaves.size(); ++i) {
      const auto is = [&](int dim, std::int64_t size) {
        return dim < 0 || (dim < leaves[i].dim() && leaves[i].size(dim) == size);
      };
      const TokenDims& dims = spec_.leaves[i];
      fits = is(dims.batch, rows) && is(dims.tokens, padded_length) && is(dims.merged, rows * padded_length) &&
             (!spec_.per_row || (dims.batch >= 0 && dims.merged < 0 && dims.tokens != -2));
    }
    if (!fits) throw DamagedData("its description of the output is not the model's");
  }

  /// Sizes up to the largest power of two that `size` reaches.
  void verified(Kind kind, std::int64_t size) {
    const auto whole = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(size)));
    profile_.verified.codes.push_back(SizeCode(kind, size_class(whole)).number());
  }

  void note(const std::string& why) { profile_.notes.push_back("token-level reuse is not available: " + why); }

  Inputs inputs(const Spans& spans, std::int64_t padded_length, std::int64_t seed) const {
    auto made =
        probe_inputs(input_spec_, model_.device(), static_cast<std::int64_t>(spans.size()), padded_length, seed);
    for (std::size_t i = 0; i < spans.size() && profile_.source_mask_argument >= 0; ++i) {
      for (const int argument : source_marks(input_spec_)) {
        const auto mark = made[static_cast<std::size_t>(argument)].toTensor()[static_cast<std::int64_t>(i)];
        const auto closed = static_cast<std::int64_t>(i % 4);
        mark.narrow(0, mark.size(0) - closed, closed).zero_();
      }
    }
    if (profile_.mask_argument < 0) return made;
    for (const int argument : marks(input_spec_, profile_.ids_argument)) {
      auto mark = made[static_cast<std::size_t>(argument)].toTensor().zero_();
      for (std::size_t i = 0; i < spans.size(); ++i) {
        mark[static_cast<std::int64_t>(i)].narrow(0, spans[i].first, spans[i].tokens).fill_(1);
      }
    }
    fill_padding(model_, input_spec_, profile_.ids_argument, made, spans);
    return made;
  }

  static Plan plan(const Subject& of, const Spans& spans, std::int64_t padded_length) {
    Batch batch;
    batch.rows = static_cast<std::int64_t>(spans.size());
    batch.padded_length = padded_length;
    batch.spans = spans;
    return batch.full_plan(static_cast<std::int32_t>(of.model.layers()));
  }

  /// Short sequences, whose sizes could be mistaken for constants, a longer one, and a ragged batch if what is packed
  /// was asked of a few layers.
  void add_short_and_long(std::vector<PlainRun>& runs) const {
    for (const std::int64_t tokens : {std::int64_t{1}, std::int64_t{2}, std::int64_t{3}, kLong}) {
      auto given = probe_inputs(input_spec_, model_.device(), 1, tokens, 3);
      try {
        auto result = model_.plain(given);
        runs.push_back({1, tokens, std::move(given), std::move(result)});
      } catch (const std::exception&) {
        // The model itself does not take as few or as many.
      }
    }
    if (&few_.model == &model_) return;
    PlainRun ragged{2, 4, {}, {}, {4, profile_.mask_argument < 0 ? 4 : 3}};
    ragged.inputs = inputs({{0, 4}, {0, ragged.real[1]}}, 4, 10);
    try {
      ragged.result = model_.plain(ragged.inputs);
      runs.push_back(std::move(ragged));
    } catch (const std::exception&) {
      // Likewise.
    }
  }

  /// Whole layers against the plain model, bit by bit: what is wrong, if anything.
  [[nodiscard]] std::string whole_layers_differ(const PlainRun& plain) const {
    try {
      const auto want = tensors_of(plain.result);
      const auto got = tensors_of(run_dense(model_, plain.inputs));
      if (want.size() != got.size()) return "another number of tensors";
      for (std::size_t i = 0; i < want.size(); ++i) {
        if (!same_bits(want[i], got[i])) return "another result";
      }
      return {};
    } catch (const std::exception& error) {
      return reason_of(error);
    }
  }

  void compare_whole_layers(const PlainRun& plain) const {
    const auto why = whole_layers_differ(plain);
    if (why.empty()) return;
    check_answers_again(model_, plain);
    throw Error(ErrorCode::kUnsupportedModel,
                fmt::format("cut at its layers, the model does not do what it does whole (batch {}, {} tokens): {}",
                            plain.rows, plain.tokens, why));
  }

  static bool agrees(const Subject& of, const c10::IValue& got, const c10::IValue& want, const Spans& spans,
                     std::int64_t padded_length) {
    for (std::size_t i = 0; i < spans.size(); ++i) {
      const auto row = static_cast<std::int64_t>(i);
      const auto a = row_of(got, of.spec, row, spans[i].first, spans[i].tokens, padded_length);
      const auto b = row_of(want, of.spec, row, spans[i].first, spans[i].tokens, padded_length);
      if (a.size() != b.size()) return false;
      for (std::size_t k = 0; k < a.size(); ++k) {
        if (!nearly_equal(a[k], b[k], of.model.rounding())) return false;
      }
    }
    return true;
  }

  /// Packed against plain on one ragged batch. Empty if they agree, else what is wrong.
  /// `others`: beside other sequences too.
  std::string packed_differs(const Spans& spans, std::int64_t padded_length, std::int64_t seed, bool others) const {
    const auto given = inputs(spans, padded_length, seed);
    const auto again = others ? std::optional(seed + 1) : std::nullopt;
    try {
      return packed_differs(few_, given, few_.model.plain(given), spans, padded_length, again);
    } catch (const std::exception&) {
      return {};
    }
  }

  /// The same at the whole depth, if the others were asked of a few layers.
  std::string packed_differs(const PlainRun& plain) const {
    if (&few_.model == &model_ || plain.real.empty()) return {};
    Spans spans;
    for (const std::int64_t tokens : plain.real) spans.push_back({0, tokens});
    if (reads_real_tokens(model_, plain.inputs, spans)) {
      return packed_differs(whole_, plain.inputs, plain.result, spans, plain.tokens, {});
    }
    const auto given = inputs(spans, plain.tokens, 10);  // other padding, that the output is not read at
    return packed_differs(whole_, given, model_.plain(given), spans, plain.tokens, {});
  }

  /// `seed`: of the other sequences to look at the first beside; none: not to.
  std::string packed_differs(const Subject& of, const Inputs& given, const c10::IValue& plain, const Spans& spans,
                             std::int64_t padded_length, std::optional<std::int64_t> seed) const {
    if (!reads_real_tokens(of.model, given, spans)) return "the output of a row is read at its padding";
    try {
      ForwardReport report;
      const auto got = execute_packed(of.model, given, plan(of, spans, padded_length), {}, nullptr, report);
      if (!agrees(of, got, plain, spans, padded_length)) return "packed rows give another result than the plain model";
      if (!seed) return {};
      // What other sequences hold must not be seen at all: bit for bit.
      auto others = inputs(spans, padded_length, *seed);
      for (std::size_t i = 0; i < given.size(); ++i) others[i].toTensor()[0].copy_(given[i].toTensor()[0]);
      const auto again = execute_packed(of.model, others, plan(of, spans, padded_length), {}, nullptr, report);
      const auto a = row_of(got, of.spec, 0, spans[0].first, spans[0].tokens, padded_length);
      const auto b = row_of(again, of.spec, 0, spans[0].first, spans[0].tokens, padded_length);
      for (std::size_t i = 0; i < a.size(); ++i) {
        if (!same_bits(a[i], b[i])) return "packed sequences see each other";
      }
      return {};
    } catch (const std::exception& error) {
      return fmt::format("rows cannot be put behind each other without their padding (the model raised: {})",
                         reason_of(error));
    }
  }

  /// Does the plain model answer a row differently when it is padded? Then it must not be found by its real tokens
  /// alone.
  bool padding_matters() const {
    const Spans spans{{0, 5}, {0, 12}};
    const auto given = inputs(spans, 12, 31);
    Inputs alone;
    for (std::size_t i = 0; i < given.size(); ++i) {
      const auto row = given[i].toTensor().narrow(0, 0, 1);
      alone.emplace_back((input_spec_.is_source(i) ? row : row.narrow(1, 0, 5)).contiguous());
    }
    try {
      const auto padded = row_of(few_.model.plain(given), few_.spec, 0, 0, 5, 12);
      const auto bare = row_of(few_.model.plain(alone), few_.spec, 0, 0, 5, 5);
      for (std::size_t i = 0; i < padded.size(); ++i) {
        if (!nearly_equal(padded[i], bare[i], model_.rounding())) return true;
      }
    } catch (const std::exception&) {
      return true;
    }
    return false;
  }

  /// `runs`: of the plain model.
  bool packed(const std::vector<PlainRun>& runs) {
    struct Case {
      Spans spans;
      std::int64_t padded_length;
    };
    std::vector<Case> cases{{{{0, 5}}, 5}, {{{0, 4}, {0, 4}}, 4}};
    if (profile_.mask_argument >= 0) {
      cases.push_back({{{0, 5}, {0, 2}, {0, 7}, {0, 1}}, 7});
      cases.push_back({{{0, 3}, {0, 8}, {0, 3}}, 8});
      cases.push_back({{{0, kLong}, {0, kLong + 1 - kPadded}}, kLong + 1});
    }
    for (std::size_t i = 0; i < cases.size(); ++i) {
      const bool others = i == 2 || i + 1 == cases.size();
      const auto seed = static_cast<std::int64_t>(i) * 5;
      const auto why = packed_differs(cases[i].spans, cases[i].padded_length, seed, others);
      if (why.empty()) continue;
      note(why);
      return false;
    }
    for (const PlainRun& plain : runs) {
      const auto why = packed_differs(plain);
      if (why.empty()) continue;
      note(why);
      return false;
    }
    if (profile_.mask_argument < 0) return true;
    if (padding_matters()) {
      note("a sequence's output depends on how far it is padded");
      return false;
    }
    const auto why = packed_differs({{3, 3}, {0, 6}, {5, 1}}, 6, 77, false);
    profile_.left_padding = why.empty();
    if (!why.empty()) profile_.notes.push_back("left-padded batches are not packed: " + why);
    return true;
  }

  /// Some tokens recomputed, the others taken from a run on the same input: the same result.
  bool partial() {
    const std::int64_t padded_length = 9;
    const std::int64_t shorter = profile_.mask_argument >= 0 ? 6 : padded_length;
    const std::vector<std::vector<std::int64_t>> actives{{8}, {5},    {1, 4, 5}, {0},
                                                         {},  {2, 3}, {0, 1, 2}, {0, 1, 2, 3, 4, 5}};
    Spans spans;
    for (std::size_t i = 0; i < actives.size(); ++i) spans.push_back({0, i % 2 == 0 ? padded_length : shorter});
    const auto layers = static_cast<std::int32_t>(few_.model.layers());
    try {
      const auto given = inputs(spans, padded_length, 21);
      Donors donors;
      ForwardReport report;
      const auto full = execute_packed(few_.model, given, plan(few_, spans, padded_length), {}, &donors, report);
      Plan part{static_cast<std::int64_t>(spans.size()), padded_length, layers, {}};
      for (std::size_t i = 0; i < spans.size(); ++i) {
        const auto row = static_cast<std::int32_t>(i);
        part.sequences.push_back(compute_some(row, 0, spans[i].tokens, layers, actives[i], row));
      }
      const auto got = execute_packed(few_.model, given, part, donors, nullptr, report);
      if (!agrees(few_, got, full, spans, padded_length)) {
        note("recomputing some tokens gives another result than computing all");
        return false;
      }
    } catch (const std::exception& error) {
      note(fmt::format("some tokens of a sequence cannot be run without the others (the model raised: {})",
                       reason_of(error)));
      return false;
    }
    return true;
  }

  const Model& model_;
  const OutputSpec& spec_;
  const OutputSpec states_ = states_output();  ///< of a shallow model
  const Subject whole_;
  const Subject few_;  ///< one layer of each kind, if there are fewer of these
  const InputSpec& input_spec_;
  ModelProfile& profile_;
};

}  // namespace

void self_check(const Model& model, const Model* shallow, const InputSpec& inputs, const Probed& probed,
                ModelProfile& profile) {
  Checker(model, shallow, inputs, probed.output, profile).run(probed.runs);
}

c10::IValue check_once(const Model& model, const InputSpec& inputs, const OutputSpec& spec, ModelProfile& profile) {
  return Checker(model, nullptr, inputs, spec, profile).run_once();
}

}  // namespace llmcache
