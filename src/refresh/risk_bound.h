// Finite-sample tests of "the mean loss is at most epsilon", for losses in [0, 1] that are independent draws from the
// traffic. Pure functions, safe from any thread. All throw Error(kInvalidOptions) for an epsilon or delta outside
// (0, 1) and Error(kInvalidInput) for counts or losses that are no such thing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace llmcache {

/// Probability of at most `successes` in `n` independent trials of success probability p.
double binomial_cdf(std::int64_t successes, std::int64_t n, double p);

/// Upper end of the one-sided exact interval (Clopper & Pearson, Biometrika 26, 1934): the true error rate is above it
/// in at most a share delta of samples. 1 for n = 0.
double clopper_pearson_upper(std::int64_t errors, std::int64_t n, double delta);

/// p-value of "mean loss > epsilon" from the sample mean of n losses (Bates et al., arXiv 2101.02703, and Angelopoulos
/// et al., Learn then Test, arXiv 2110.01052, section 2): the smaller one of Hoeffding's and Bentkus's.
double hoeffding_bentkus_p_value(double mean, std::int64_t n, double epsilon);

/// p-value of "mean loss >= epsilon" by betting (Waudby-Smith & Ramdas, arXiv 2010.09686): 1 / the largest capital that
/// a gambler who stakes nu_i on each loss being below epsilon ever holds, with their predictable plug-in nu_i, at most
/// 1. It adapts to the variance, so it is far stronger than the above for losses that are small but seldom 0.
/// The order of the losses matters: give them as drawn, never sorted. `level` is where the bets aim; the p-value is
/// valid for any.
double betting_p_value(std::span<const double> losses, double epsilon, double level = 0.1);

enum class LossKind {
  kBinary,  ///< each loss is 0 or 1: the exact binomial p-value
  kReal,    ///< anything in [0, 1]: betting_p_value
};

/// The most liberal level that is safe: `losses[l]` are those of level l on the calibration sample, levels in an order
/// fixed before looking, from the safest on. Fixed-sequence testing (Learn then Test, section 2): each level is tested
/// at the full delta, and the first one not proven ends it. So with probability 1 - delta no level up to the chosen one
/// has a mean loss above epsilon. -1: not even the first.
std::int64_t choose_level(std::span<const std::vector<double>> losses, double epsilon, double delta, LossKind kind);

}  // namespace llmcache
