// An analysed TorchScript module as a Model, and the program that it runs. Internal to model/torchscript*.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "llmcache/options.h"
#include "model/torchscript_analysis.h"
#include "model/torchscript_packed_weights.h"
#include "model/torchscript_subgraph.h"

namespace llmcache::ts {

/// Slots of the values that cross between the parts of an analysed model.
struct Program {
  Slots slots;
  SharedCode as_module{Executor::kOfModule};
  SharedCode simple{Executor::kSimple};
  Subgraph source;  ///< the source part, if there is one; runs before `embed`
  Subgraph embed;
  std::vector<Subgraph> layers;
  Subgraph head;
  Subgraph position;                   ///< of the token that the head reads, where it chooses one a row
  std::vector<int> hidden;             ///< slot of hidden[l]
  std::vector<std::vector<int>> dead;  ///< dead[l]: slots that nobody reads after layer l
};

Program build_program(const Analysis& analysis);

/// Token-level operation of an analysed model; null and a reason if there is none.
std::unique_ptr<TokenLevelModel> make_token_level(const std::shared_ptr<const Analysis>& analysis, Program& program,
                                                  std::vector<AttentionOp>& attention_ops,
                                                  std::vector<std::string>& notes);

/// `reason`: why the weights were chosen, if the caller left it open. Throws Error(kNotAvailable) as pack_weights().
std::unique_ptr<Model> make_model(Analysis analysis, Weights weights, std::string reason, const Int8Recipes& recipes);

}  // namespace llmcache::ts
