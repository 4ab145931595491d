// The meaning is in trm_fast/data/synthetic/listops.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "data/random.h"

namespace trm_data::listops {

enum Token : uint8_t { kPad, kZero, kMax = 11, kMin, kMed, kSum, kClose };
constexpr int kOperations = 4;

struct Wanted {
  int min_length, max_length;
  int max_depth, max_args;
  double nesting;
};

// Makes one attempt; false where it is not what is wanted.
inline bool generate(const Wanted& wanted, Random random, uint8_t* tokens) {
  std::vector<int> missing;  // arguments that each open operation still needs
  int length = 0, needed = 0;
  const auto open = [&] {
    tokens[length++] = static_cast<uint8_t>(kMax + random.below(kOperations));
    missing.push_back(2 + random.below(wanted.max_args - 1));
    needed += missing.back() + 1;
  };
  std::memset(tokens, kPad, wanted.max_length);
  open();
  // Tokens that are there and those that must come.
  while (length + needed <= wanted.max_length) {
    --needed;
    if (missing.back() == 0) {
      tokens[length++] = kClose;
      missing.pop_back();
      if (missing.empty()) return length >= wanted.min_length;
      continue;
    }
    --missing.back();
    if (static_cast<int>(missing.size()) < wanted.max_depth && random.uniform() < wanted.nesting) {
      open();
    } else {
      tokens[length++] = static_cast<uint8_t>(kZero + random.below(10));
    }
  }
  return false;
}

inline int apply(uint8_t operation, int* args, int64_t count) {
  if (operation == kSum) return static_cast<int>(std::accumulate(args, args + count, int64_t{0}) % 10);
  std::sort(args, args + count);
  if (operation == kMin) return args[0];
  if (operation == kMax) return args[count - 1];
  return (args[(count - 1) / 2] + args[count / 2]) / 2;
}

// The value, or -1 if the tokens are not one expression with nothing but padding behind it.
inline int evaluate(const uint8_t* tokens, int64_t length) {
  std::vector<int64_t> opened;  // where each open operation begins
  std::vector<size_t> first;    // where its arguments begin in values
  std::vector<int> values;
  int64_t end = length;
  while (end > 0 && tokens[end - 1] == kPad) --end;
  for (int64_t i = 0; i < end; ++i) {
    const uint8_t token = tokens[i];
    if (opened.empty() && i > 0) return -1;
    if (token >= kMax && token < kClose) {
      opened.push_back(i);
      first.push_back(values.size());
    } else if (token == kClose) {
      if (opened.empty() || first.back() == values.size()) return -1;
      int* args = values.data() + first.back();
      args[0] = apply(tokens[opened.back()], args, static_cast<int64_t>(values.size() - first.back()));
      values.resize(first.back() + 1);
      opened.pop_back();
      first.pop_back();
    } else if (token >= kZero && token < kMax) {
      values.push_back(token - kZero);
    } else {
      return -1;
    }
  }
  return opened.empty() && values.size() == 1 ? values[0] : -1;
}

}  // namespace trm_data::listops
