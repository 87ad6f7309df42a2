// Telling from outside how much memory something holds that is under way.
#pragma once

#include <atomic>
#include <cstddef>

namespace llmcache {

/// Sum of what its shares hold now. Thread-safe.
class ByteGauge {
 public:
  /// One holder's part, for as long as it lives. Of one thread.
  class Share {
   public:
    explicit Share(ByteGauge& gauge) : gauge_(gauge) {}
    ~Share() { set(0); }
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;

    void set(std::size_t bytes) noexcept {
      gauge_.bytes_ += bytes - bytes_;  // wraps around where it gets less
      bytes_ = bytes;
    }

   private:
    ByteGauge& gauge_;
    std::size_t bytes_ = 0;
  };

  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::atomic<std::size_t> bytes_{0};
};

}  // namespace llmcache
