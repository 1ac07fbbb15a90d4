// SPDX-License-Identifier: Apache-2.0
// moesaic verify: the full product of the case list against the float64 oracle.
#include "harness/verify.h"

#include <fmt/format.h>

#include <charconv>
#include <chrono>

#include "backend.h"
#include "harness/cases.h"
#include "tools/command.h"

namespace moesaic::tool {
namespace {

using harness::Status;
using harness::VerifyResult;

struct VerifyFlags {
  std::string scheme, format, activation, shape, tokens, part;
  std::int64_t limit = 0;
  bool bits = false;
};

// "i/n": of n parts the i-th, which has the i-th case of every n, so that all parts take as long.
std::vector<harness::Case> part_of(std::vector<harness::Case> cases, std::string_view text) {
  std::size_t part = 0, parts = 0;
  const char* const end = text.data() + text.size();
  const auto [slash, error] = std::from_chars(text.data(), end, part);
  if (error == std::errc{} && slash != end && *slash == '/') {
    const auto [last, bad] = std::from_chars(slash + 1, end, parts);
    if (bad != std::errc{} || last != end) parts = 0;
  }
  if (part < 1 || part > parts)
    throw UsageError(fmt::format("--part: expected i/n such as 2/8, got '{}'", text));
  std::vector<harness::Case> mine;
  for (std::size_t i = part - 1; i < cases.size(); i += parts) mine.push_back(std::move(cases[i]));
  if (mine.empty())
    throw UsageError(fmt::format("--part {}: there are {} cases", text, cases.size()));
  return mine;
}

std::vector<harness::Case> wanted(const VerifyFlags& flags) {
  harness::CaseFilter filter;
  if (flags.scheme.find('+') != std::string::npos)
    filter.variant = harness::parse_variant(flags.scheme).name;
  else if (!flags.scheme.empty())
    filter.scheme = parse_scheme(flags.scheme);
  if (!flags.format.empty()) filter.format = parse_format(flags.format);
  if (!flags.activation.empty()) filter.activation = parse_activation(flags.activation);
  if (!flags.shape.empty()) filter.shape = harness::parse_shape(flags.shape);
  std::vector<harness::Case> cases;
  const std::vector<std::int64_t> counts =
      flags.tokens.empty() ? std::vector<std::int64_t>{-1} : parse_counts("--tokens", flags.tokens);
  for (const std::int64_t tokens : counts) {
    if (tokens >= 0) filter.tokens = tokens;
    for (harness::Case& c : harness::product_cases(filter)) cases.push_back(std::move(c));
  }
  if (cases.empty()) throw UsageError("no case matches these flags; leave one of them out");
  // A sample of the whole rather than its beginning: every n-th case.
  const auto count = static_cast<std::int64_t>(cases.size());
  if (flags.limit > 0 && flags.limit < count) {
    std::vector<harness::Case> sample;
    for (std::int64_t i = 0; i < flags.limit; ++i)
      sample.push_back(cases[static_cast<std::size_t>(i * count / flags.limit)]);
    cases = std::move(sample);
  }
  if (!flags.part.empty()) return part_of(std::move(cases), flags.part);
  return cases;
}

nlohmann::json to_json(const VerifyResult& r) {
  return {{"name", r.name},
          {"status", name(r.status)},
          {"max_error", r.max_error},
          {"bound", r.bound},
          {"ratio", r.ratio},
          {"relative_error", r.relative_error},
          {"quantization_error", r.quantization_error},
          {"reason", r.reason}};
}

int verify(const VerifyFlags& flags, const Common& common) {
  const Device device = apply(common);
  const Output out(common);
  const std::vector<harness::Case> cases = wanted(flags);
  nlohmann::json results = nlohmann::json::array();
  int passed = 0, failed = 0, skipped = 0;
  double worst = 0;
  std::string worst_name;
  const auto begin = std::chrono::steady_clock::now();
  {
    Progress progress;
    for (const harness::Case& c : cases) {
      progress.show(fmt::format("[{}/{}] {} failed  {}", results.size() + 1, cases.size(), failed,
                                harness::name(c)));
      const VerifyResult r =
          flags.bits ? harness::check_bits(c, device) : harness::run_case(c, device);
      results.push_back(to_json(r));
      passed += r.status == Status::kPassed;
      failed += r.status == Status::kFailed;
      skipped += r.status == Status::kSkipped;
      if (r.ratio > worst) worst = r.ratio, worst_name = r.name;
      if (r.status == Status::kFailed) out.line(fmt::format("FAILED {}: {}", r.name, r.reason));
    }
  }
  if (passed + failed == 0 && flags.part.empty())
    throw UsageError(fmt::format("no case could run, the first because of {}",
                                 results[0]["reason"].get<std::string>()));
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  out.line(fmt::format("{} cases on {}: {} passed, {} failed, {} skipped, {:.1f} s", cases.size(),
                       to_string(device), passed, failed, skipped, seconds));
  if (!worst_name.empty())
    out.line(fmt::format("closest to its bound: {} at {:.2f} of it", worst_name, worst));
  out.write_json({{"device", to_string(device)},
                  {"passed", passed},
                  {"failed", failed},
                  {"skipped", skipped},
                  {"cases", results}});
  return failed > 0 ? 1 : 0;
}

}  // namespace

Command add_verify(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("verify", "Every case against the float64 oracle");
  auto common = std::make_shared<Common>();
  auto flags = std::make_shared<VerifyFlags>();
  app->add_option("--scheme", flags->scheme,
                  "only this scheme, all its variants; or one variant such as int4_w4a16+g32+zp");
  app->add_option("--format", flags->format, "only standard, sorted or batched");
  app->add_option("--activation", flags->activation, "only this activation");
  app->add_option("--shape", flags->shape, "only this shape: a name or E,H,I,k");
  app->add_option("--tokens", flags->tokens, "only these token counts, e.g. 1,17");
  app->add_option("--limit", flags->limit, "an even sample of this many cases")
      ->check(whole(1, kMaxCount));
  app->add_option("--part", flags->part,
                  "the i-th of n parts, such as 2/8: one process each shares the list");
  app->add_flag("--bits", flags->bits, "check instead that bits depend on the token alone");
  add_common(*app, *common);
  return {app, [common, flags] { return verify(*flags, *common); }};
}

}  // namespace moesaic::tool
