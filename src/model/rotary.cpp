#include "model/rotary.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

namespace llmcache {
namespace {

using Layout = KeyRotation::Layout;

constexpr std::int64_t kLeastPositions = 16;
/// Pairs below this part of the largest magnitude are not looked at by themselves, those far below not believed.
constexpr double kSmallPair = 0.05;
constexpr double kNoEvidence = 1e-3;

/// [heads, tokens, channels], double.
at::Tensor flat(const at::Tensor& keys, std::int64_t token_dim) {
  const KeyDims dims = key_dims_of(keys, token_dim);
  const auto last = keys.detach().to(at::kDouble).movedim({dims.tokens, dims.channels}, {-2, -1});
  return last.reshape({-1, last.size(-2), last.size(-1)});
}

/// Two views of the keys: first and second channel of each pair.
struct Pairs {
  at::Tensor a, b;
};

Pairs pairs_of(const at::Tensor& keys, std::int64_t dim, Layout layout, std::int64_t pairs) {
  if (layout == Layout::kHalves) return {keys.narrow(dim, 0, pairs), keys.narrow(dim, pairs, pairs)};
  return {keys.slice(dim, 0, 2 * pairs, 2), keys.slice(dim, 1, 2 * pairs, 2)};
}

at::Tensor complex_pairs(const at::Tensor& keys, Layout layout, std::int64_t pairs) {
  const auto [a, b] = pairs_of(keys, 2, layout, pairs);
  return at::complex(a.contiguous(), b.contiguous());
}

/// Largest change of a pair's length over the positions, squared lengths against the squared largest magnitude. Turning
/// leaves lengths as they are; wrongly paired channels show it.
double length_change(const at::Tensor& keys, Layout layout, std::int64_t pairs, double scale) {
  const auto [a, b] = pairs_of(keys, 2, layout, pairs);
  const auto length = a * a + b * b;
  return (length - length.narrow(1, 0, 1)).abs().max().item<double>() / (scale * scale);
}

/// Angles between neighbours at growing distance: each doubling halves the error, and the estimate before it says how
/// many whole angles to add.
std::vector<double> frequencies_of(const at::Tensor& z) {
  const auto advance = [&](std::int64_t step) {
    const auto n = z.size(1) - step;
    const auto sum = (z.narrow(1, 0, n).conj() * z.narrow(1, step, n)).sum(at::IntArrayRef{0, 1});
    return sum.angle().cpu().contiguous();
  };
  const auto pairs = static_cast<std::size_t>(z.size(2));
  std::vector<double> frequencies(pairs, 0.0);
  for (std::int64_t step = 1; step <= z.size(1) / 2; step *= 2) {
    const auto angles = advance(step);
    const double* angle = angles.const_data_ptr<double>();
    const auto distance = static_cast<double>(step);
    constexpr double kTurn = 2 * std::numbers::pi;
    for (std::size_t i = 0; i < pairs; ++i) {
      const double whole = step == 1 ? 0 : std::round((distance * frequencies[i] - angle[i]) / kTurn);
      frequencies[i] = (angle[i] + kTurn * whole) / distance;
    }
  }
  return frequencies;
}

/// Largest distance of the keys from those that the rotation makes of the ones at some positions, pair by pair against
/// the largest length of the pair (but a small part of the largest magnitude at least: below it is rounding).
double error_of(const KeyRotation& rotation, const at::Tensor& keys) {
  const auto tokens = keys.size(1);
  const auto pairs = static_cast<std::int64_t>(rotation.frequencies.size());
  const double scale = keys.abs().max().item<double>();
  const auto rest = keys.narrow(2, 2 * pairs, keys.size(2) - 2 * pairs);
  double error = rest.numel() == 0 ? 0 : (rest - rest.narrow(1, 0, 1)).abs().max().item<double>() / scale;
  const auto z = complex_pairs(keys, rotation.layout, pairs);
  const auto lengths = z.abs().amax(at::IntArrayRef{0, 1}).clamp_min(kSmallPair * scale);
  const auto frequencies = at::tensor(rotation.frequencies, lengths.options());
  const auto positions = at::arange(tokens, frequencies.options()).unsqueeze(1);
  for (const std::int64_t from : {std::int64_t{0}, tokens / 3, tokens - 1}) {
    const auto angles = (positions - static_cast<double>(from)) * frequencies;
    const auto foretold = z.narrow(1, from, 1) * at::polar(at::ones_like(angles), angles);
    error = std::max(error, ((foretold - z).abs() / lengths).max().item<double>());
  }
  return error;
}

}  // namespace

double key_tolerance(at::ScalarType type) {
  if (type == at::kBFloat16) return 0.04;
  if (type == at::kHalf) return 0.005;
  return 5e-4;
}

KeyDims key_dims_of(const at::Tensor& keys, std::int64_t token_dim) {
  const auto rank = keys.dim();
  return {token_dim, token_dim == rank - 1 ? rank - 2 : rank - 1};
}

bool same_at_all_positions(const at::Tensor& keys, std::int64_t token_dim) {
  const auto all = flat(keys, token_dim);
  const double change = (all - all.narrow(1, 0, 1)).abs().max().item<double>();
  return change <= key_tolerance(keys.scalar_type()) * all.abs().max().item<double>();
}

std::optional<KeyRotation> find_rotation(const at::Tensor& keys, std::int64_t token_dim, std::string& why) {
  const auto all = flat(keys, token_dim);
  const auto tokens = all.size(1);
  const auto channels = all.size(2);
  const double scale = all.abs().max().item<double>();
  const double tolerance = key_tolerance(keys.scalar_type());
  if (tokens < kLeastPositions || !std::isfinite(scale) || scale == 0) {
    why = fmt::format("{} positions of keys of magnitude {}, at least {} finite ones are expected", tokens, scale,
                      kLeastPositions);
    return std::nullopt;
  }
  const auto change = (all - all.narrow(1, 0, 1)).abs().amax(at::IntArrayRef{0, 1});
  const auto varying = change.gt(tolerance * scale).nonzero();
  const auto used = varying.size(0) == 0 ? 1 : varying[-1][0].item<std::int64_t>() + 1;

  KeyRotation rotation;
  double best = std::numeric_limits<double>::infinity();
  std::int64_t pairs = 0;
  const auto consider = [&](Layout layout, std::int64_t count) {
    const double off = length_change(all, layout, count, scale);
    if (off >= best) return;
    best = off;
    pairs = count;
    rotation.layout = layout;
  };
  for (std::int64_t count = channels / 2; count >= (used + 1) / 2; --count) consider(Layout::kHalves, count);
  consider(Layout::kInterleaved, channels / 2);
  if (best > 4 * tolerance) {
    why = fmt::format("no pairing of channels keeps its length over the positions (best: off by {:.3g})", best);
    return std::nullopt;
  }
  const auto z = complex_pairs(all, rotation.layout, pairs);
  if (z.abs().amax(at::IntArrayRef{0, 1}).min().item<double>() < kNoEvidence * scale) {
    why = "some channels of the probed keys are too small to show how they turn";
    return std::nullopt;
  }
  rotation.frequencies = frequencies_of(z.narrow(1, 0, tokens / 2));
  if (const double error = error_of(rotation, all); error > tolerance) {
    why = fmt::format("the rotation found foretells keys only up to {:.3g} of their magnitude", error);
    return std::nullopt;
  }
  return rotation;
}

bool foretells(const KeyRotation& rotation, const at::Tensor& keys, std::int64_t token_dim) {
  const auto all = flat(keys, token_dim);
  if (2 * static_cast<std::int64_t>(rotation.frequencies.size()) > all.size(2)) return false;
  return error_of(rotation, all) <= key_tolerance(keys.scalar_type());
}

RotationAngles angles_of(const KeyRotation& rotation, const std::vector<std::int64_t>& moves, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const auto angles = at::tensor(moves, options.dtype(at::kLong)).to(at::kDouble).unsqueeze(1) *
                      at::tensor(rotation.frequencies, options);
  return {angles.cos().to(device, at::kFloat), angles.sin().to(device, at::kFloat)};
}

void rotate_(at::Tensor& keys, std::int64_t token_dim, const KeyRotation& rotation, const RotationAngles& angles) {
  const KeyDims dims = key_dims_of(keys, token_dim);
  const auto pairs = static_cast<std::int64_t>(rotation.frequencies.size());
  std::vector<std::int64_t> shape(static_cast<std::size_t>(keys.dim()), 1);
  shape[static_cast<std::size_t>(dims.tokens)] = angles.cos.size(0);
  shape[static_cast<std::size_t>(dims.channels)] = pairs;
  const auto fit = [&](const at::Tensor& table) {
    return (dims.tokens < dims.channels ? table : table.t()).reshape(shape);
  };
  const auto cos = fit(angles.cos);
  const auto sin = fit(angles.sin);
  const auto [a, b] = pairs_of(keys, dims.channels, rotation.layout, pairs);
  const auto x = a.to(at::kFloat);
  const auto y = b.to(at::kFloat);
  const auto turned = (x * cos).sub_(y * sin);
  b.copy_((y * cos).add_(x * sin));
  a.copy_(turned);
}

}  // namespace llmcache
