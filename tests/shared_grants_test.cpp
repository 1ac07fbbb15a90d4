// SPDX-License-Identifier: Apache-2.0
// What is granted stays granted: once per kernel, device and larger size, from any number of
// threads.
#include "cuda/shared_grants.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

namespace moesaic::cuda {
namespace {

const void* kernel_at(std::size_t i) {
  static char code[1 << 16];
  return code + i * 16;
}

TEST(SharedGrants, AsksOnceAndAgainForMore) {
  const auto grants = std::make_unique<SharedGrants>();
  int asked = 0;
  const auto ask = [&] { ++asked; };
  for (int i = 0; i < 3; ++i) grants->require(kernel_at(1), 0, 100, ask);
  EXPECT_EQ(asked, 1);
  grants->require(kernel_at(1), 0, 60, ask);
  EXPECT_EQ(asked, 1);
  grants->require(kernel_at(1), 0, 101, ask);
  EXPECT_EQ(asked, 2);
  grants->require(kernel_at(1), 1, 100, ask);  // another device
  grants->require(kernel_at(2), 0, 100, ask);  // another kernel
  EXPECT_EQ(asked, 4);
}

TEST(SharedGrants, WhatWasRefusedIsAskedForAgain) {
  const auto grants = std::make_unique<SharedGrants>();
  const auto refuse = [] { throw std::runtime_error("too much"); };
  EXPECT_THROW(grants->require(kernel_at(1), 0, 100, refuse), std::runtime_error);
  EXPECT_THROW(grants->require(kernel_at(1), 0, 100, refuse), std::runtime_error);
  int asked = 0;
  grants->require(kernel_at(1), 0, 50, [&] { ++asked; });
  EXPECT_THROW(grants->require(kernel_at(1), 0, 100, refuse), std::runtime_error);
  grants->require(kernel_at(1), 0, 50, [&] { ++asked; });
  EXPECT_EQ(asked, 1);
}

TEST(SharedGrants, MoreKernelsThanItRemembers) {
  const auto grants = std::make_unique<SharedGrants>();
  std::vector<int> asked(1 << 12);
  for (int round = 0; round < 2; ++round) {
    for (std::size_t i = 0; i < 2 * asked.size(); ++i)
      grants->require(kernel_at(i / 2), static_cast<int>(i % 2), 100, [&] { ++asked[i / 2]; });
  }
  for (const int times :
       asked) {  // twice where it was remembered on both devices, or told each time
    EXPECT_GE(times, 2);
    EXPECT_LE(times, 4);
  }
  EXPECT_EQ(asked.front(), 2);
}

// The runtime keeps the last size it was told, which must be the largest that anyone asked for.
TEST(SharedGrants, NoThreadTakesAwayWhatAnotherWasGranted) {
  const auto grants = std::make_unique<SharedGrants>();
  constexpr std::size_t kKernels = 500, kDevices = 3, kThreads = 8;
  std::vector<std::atomic<std::size_t>> told(kKernels * kDevices);
  std::vector<std::vector<std::size_t>> asked(kThreads, std::vector<std::size_t>(told.size()));
  std::atomic<int> below{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (std::size_t i = 0; i < told.size() * 4; ++i) {
        const std::size_t at = i / 4, bytes = 1 + random() % 1000;
        grants->require(kernel_at(at / kDevices), static_cast<int>(at % kDevices), bytes, [&] {
          std::this_thread::yield();  // others meet at the lock
          told[at] = bytes;
        });
        if (told[at] < bytes) ++below;
        asked[t][at] = std::max(asked[t][at], bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(below, 0);
  for (std::size_t at = 0; at < told.size(); ++at) {
    for (const std::vector<std::size_t>& most : asked) ASSERT_GE(told[at], most[at]);
  }
}

}  // namespace
}  // namespace moesaic::cuda
