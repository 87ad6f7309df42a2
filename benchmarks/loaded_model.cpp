#include "loaded_model.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "failure.h"

namespace llmcache::bench {
namespace {

double sum_of_squares(const at::Tensor& tensor) {
  const at::Tensor values = tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
  return values.square().sum(at::kDouble).item<double>();
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

std::string one_line(const std::exception& error) {
  if (dynamic_cast<const Failure*>(&error) != nullptr) return error.what();
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  // TorchScript prints the traceback first, the reason behind it.
  const auto reason = text.rfind("RuntimeError: ");
  if (reason != std::string::npos) text = text.substr(reason);
  text = text.substr(0, text.find('\n'));
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < ' '; }, ' ');
  return text;
}

LoadedModel::LoadedModel(const ModelFile& file) : file_(file) {
  try {
    module_ = torch::jit::load(file_.path.string(), at::kCPU);
  } catch (const std::exception& error) {
    throw Failure(fmt::format("model {}: cannot be loaded as TorchScript ({}); export it again", file_.path.string(),
                              one_line(error)));
  }
  find_inputs();
  try {
    find_token_outputs();
  } catch (const Failure& error) {
    throw Failure(fmt::format("model {}: {}", file_.name, error.what()));
  } catch (const std::exception& error) {
    throw Failure(fmt::format("model {}: fails on its first ids ({})", file_.name, one_line(error)));
  }
}

void LoadedModel::find_inputs() {
  const auto method = module_.find_method("forward");
  if (!method) throw Failure(fmt::format("model {}: it has no method forward; export it again", file_.name));
  const auto& arguments = method->function().getSchema().arguments();
  for (std::size_t i = 1; i < arguments.size(); ++i) {  // 0 is self
    const std::string& name = arguments[i].name();
    if (i == 1) {
      inputs_.push_back(Input::kIds);
    } else if (contains(name, "pool")) {
      inputs_.push_back(Input::kPool);
    } else if (contains(name, "mask")) {
      inputs_.push_back(Input::kMask);
    } else if (contains(name, "token_type") || contains(name, "segment")) {
      inputs_.push_back(Input::kTypes);
    } else if (arguments[i].default_value()) {
      break;  // the rest is optional
    } else {
      throw Failure(
          fmt::format("model {}: input {} is '{}', expected input_ids, attention_mask and perhaps "
                      "token_type_ids; wrap the model in a module that takes these",
                      file_.name, i, name));
    }
  }
  if (inputs_.empty()) throw Failure(fmt::format("model {}: its forward takes no inputs", file_.name));
}

void LoadedModel::find_token_outputs() {
  // An output that is as long as the input, for two lengths, has one entry a token.
  const std::vector<std::int32_t> ids(3, 0);
  const auto outputs_of = [&](std::size_t length) { return tensors_of(plain(inputs({std::span(ids).first(length)}))); };
  const auto shorter = outputs_of(2);
  const auto outputs = outputs_of(3);
  if (outputs.size() != shorter.size()) throw Failure("it returns a varying number of tensors");
  const auto is_long = [](const at::Tensor& tensor, std::int64_t length) {
    return tensor.dim() >= 2 && tensor.size(1) == length;
  };
  std::size_t marks_of_tokens = 0;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor& output = outputs[i];
    const auto number = static_cast<std::int64_t>(i);
    token_output_.push_back(is_long(shorter[i], 2) && is_long(output, 3));
    if (!output.is_floating_point()) continue;
    if (output.dim() == 2 && token_output_[i]) {
      ++marks_of_tokens;
    } else if (output.dim() == 2 && shape_.pooled_output < 0) {
      shape_.pooled_output = number;
      shape_.pooled_dims = output.size(1);
    } else if (output.dim() == 3 && token_output_[i] && shape_.logits_output < 0) {
      shape_.logits_output = number;
      shape_.logits_dims = output.size(2);
    }
  }
  shape_.answer_span = outputs.size() == 2 && marks_of_tokens == 2;
}

std::shared_ptr<Cache> LoadedModel::make_cache(const Options& options) {
  try {
    auto& first = wrapped_[options.weights];
    if (first) return std::make_shared<Cache>(first->with_options(options));
    Options own = options;
    own.weights_sample = weights_sample_;
    if (saved_profiles_) own.profile_path = file_.path.string() + "." + to_string(own.weights) + ".profile";
    return first = std::make_shared<Cache>(module_, own);
  } catch (const std::exception& error) {
    throw Failure(
        fmt::format("model {}: cannot be wrapped ({}); --mode nocache runs it plain", file_.name, one_line(error)));
  }
}

WrapCost LoadedModel::wrap(const Options& options, const std::string& name) {
  const std::int64_t before = resident_bytes();
  const std::shared_ptr<Cache> cache = make_cache(options);
  const std::int64_t after = resident_bytes();
  if (!cache_) cache_ = cache;
  named_[name] = cache;
  const ModelProfile& profile = cache->profile();
  return {.model = file_.name,
          .weights = file_.weights,
          .held = profile.weights,
          .granularity = to_string(profile.granularity),
          .notes = profile.notes,
          .saved_profile = profile.file_note,
          .wrap_ms = profile.wrap_ms,
          .resident_before = before,
          .resident_after = after,
          .weight_bytes = static_cast<std::int64_t>(profile.weight_bytes),
          .packed_bytes = static_cast<std::int64_t>(profile.packed_weight_bytes)};
}

std::shared_ptr<Cache> LoadedModel::cache_named(const std::string& name, const Options& options) {
  auto& cache = named_[name];
  if (!cache) cache = make_cache(options);
  return cache;
}

Inputs LoadedModel::inputs(const Rows& rows, const std::vector<RowMarks>& marks) const {
  const auto longest = static_cast<std::size_t>(padded_length(rows));
  const bool padded = std::ranges::any_of(rows, [&](const auto& row) { return row.size() != longest; });
  if (padded && std::ranges::find(inputs_, Input::kMask) == inputs_.end()) {
    throw Failure(
        fmt::format("model {}: it takes no attention mask, and the workload has sequences of different "
                    "lengths in one request",
                    file_.name));
  }
  const at::Tensor ids = at::zeros({std::ssize(rows), padded_length(rows)}, at::kLong);
  const at::Tensor mask = at::zeros_like(ids);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    std::copy(rows[row].begin(), rows[row].end(), ids.data_ptr<std::int64_t>() + row * longest);
    std::fill_n(mask.data_ptr<std::int64_t>() + row * longest, rows[row].size(), std::int64_t{1});
  }
  const at::Tensor pool = mask.clone();
  const at::Tensor types = at::zeros_like(ids);
  for (std::size_t row = 0; row < marks.size(); ++row) {
    std::copy(marks[row].pool.begin(), marks[row].pool.end(), pool.data_ptr<std::int64_t>() + row * longest);
    const auto length = static_cast<std::int64_t>(rows[row].size());
    const std::int64_t begin = marks[row].second_text;
    if (begin >= 0 && begin < length) types[static_cast<std::int64_t>(row)].slice(0, begin, length).fill_(1);
  }
  const at::Tensor by_kind[] = {ids, mask, pool, types};  // as Input
  Inputs values;
  for (const Input input : inputs_) values.emplace_back(by_kind[static_cast<std::size_t>(input)]);
  return values;
}

c10::IValue LoadedModel::plain(const Inputs& inputs) {
  const at::NoGradGuard no_grad;
  return module_.forward(inputs);
}

double LoadedModel::divergence(const c10::IValue& reference, const std::vector<Returned>& others) const {
  const at::NoGradGuard no_grad;
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  const auto expected = tensors_of(reference);
  double difference = 0;
  double norm = 0;
  bool compared = false;
  const auto compare = [&](const at::Tensor& x, const at::Tensor& y) {
    difference += sum_of_squares(x.is_floating_point() ? x - y : x.to(at::kDouble) - y.to(at::kDouble));
    norm += sum_of_squares(x);
    compared = true;
  };
  for (const Returned& call : others) {
    const auto found = tensors_of(call.output);
    if (found.size() != expected.size()) return kInfinite;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const at::Tensor& a = expected[i];
      const at::Tensor& b = found[i];
      if (!token_output_.at(i)) {
        if (&call != &others.back()) continue;
        if (a.sizes() != b.sizes()) return kInfinite;
        compare(a, b);
        continue;
      }
      if (a.dim() != b.dim() || a.size(0) != b.size(0) || a.sizes().slice(2) != b.sizes().slice(2)) return kInfinite;
      if (std::ssize(call.tokens) != b.size(0)) return kInfinite;
      for (std::int64_t row = 0; row < b.size(0); ++row) {
        const auto [begin, end] = call.tokens[static_cast<std::size_t>(row)];
        if (end > a.size(1) || end - begin > b.size(1)) return kInfinite;
        if (begin < end) compare(a[row].slice(0, begin, end), b[row].slice(0, 0, end - begin));
      }
    }
  }
  if (!compared) return std::numeric_limits<double>::quiet_NaN();
  if (norm == 0) return difference == 0 ? 0 : kInfinite;
  return std::sqrt(difference / norm);
}

}  // namespace llmcache::bench
