// What was verified, in JSON: as calibration profiles and saved model profiles hold it.
#pragma once

#include "llmcache/model/verified_envelope.h"
#include "store/bounded_json.h"

namespace llmcache {

/// Throws DamagedData if a number is missing or negative, or if the codes do not rise or are too many.
VerifiedEnvelope read_verified(const JsonObject& json);

}  // namespace llmcache
