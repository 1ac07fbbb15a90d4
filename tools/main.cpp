// SPDX-License-Identifier: Apache-2.0
// The moesaic command. Exit codes: 0 done; 1 a verification failed or the machine did; 2 the
// command line, a file or the combination asked for is wrong, said in one sentence on stderr.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <new>

#include "tools/command.h"
#include "words.h"

namespace moesaic::tool {
namespace {

int exit_code(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
    case ErrorCode::kUnsupported:
    case ErrorCode::kNotReady:
    case ErrorCode::kIo:
    case ErrorCode::kCorruptFile:
      return 2;
    case ErrorCode::kOutOfMemory:
    case ErrorCode::kDevice:
    case ErrorCode::kInternal:
      return 1;
  }
  return 1;
}

int complain(std::string_view message, int code) {
  say_on_stderr(message);
  return code;
}

// CLI11 ends some of its sentences with a line break and lists; one line is what we promise.
std::string first_line(std::string text) {
  text.erase(std::min(text.find('\n'), text.size()));
  return text;
}

int run(int argc, char** argv) {
  CLI::App app("Moesaic: the Mixture-of-Experts feed-forward layer at inference.", "moesaic");
  app.set_version_flag("--version", "moesaic " + version());
  app.require_subcommand(1);
  const Command commands[] = {add_info(app),   add_inspect(app), add_run(app),
                              add_verify(app), add_bench(app),   add_quantize(app)};
  if (argc > 1) {  // CLI11 would only say that a subcommand is missing
    const std::string_view first = argv[1];
    std::string names;
    bool known = app.get_option_no_throw(argv[1]) != nullptr;
    for (const Command& command : commands) {
      known = known || command.app->get_name() == first;
      append_word(names, command.app->get_name());
    }
    if (!known)
      return complain(fmt::format("there is no {} '{}'; the commands are {}",
                                  first.starts_with('-') ? "option" : "command", first, names),
                      2);
  }
  for (int i = 1; i < argc; ++i)  // CLI11 takes an empty value for one that was not given
    if (*argv[i] == '\0')
      return complain(
          fmt::format("the argument behind '{}' is empty; give a value, or leave the flag out",
                      argv[i - 1]),
          2);
  for (const Command& command : commands)  // CLI11 takes a flag for the value of the one before
    for (int i = 2; i + 1 < argc; ++i) {
      if (command.app->get_name() != argv[1] || !std::string_view(argv[i + 1]).starts_with("--"))
        continue;
      const CLI::Option* option = command.app->get_option_no_throw(argv[i]);
      if (option != nullptr && std::string_view(argv[i]).starts_with('-') &&
          option->get_items_expected_min() > 0)
        return complain(fmt::format("{}: expected a value, got the flag '{}'; a file of that name "
                                    "is ./{}",
                                    argv[i], argv[i + 1], argv[i + 1]),
                        2);
    }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    const CLI::App* at = &app;
    for (const Command& command : commands)
      if (command.app->parsed()) at = command.app;
    const std::string where = at == &app ? "moesaic" : "moesaic " + at->get_name();
    return complain(fmt::format("{}; see `{} --help`", first_line(error.what()), where), 2);
  }
  int status = 2;
  for (const Command& command : commands)
    if (command.app->parsed()) status = command.run();
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    return complain("stdout: the result cannot be written; is the disk full?", 1);
  return status;
}

}  // namespace
}  // namespace moesaic::tool

int main(int argc, char** argv) {
  using namespace moesaic;
  tool::process_start();
  try {
    return tool::run(argc, argv);
  } catch (const tool::UsageError& error) {
    return tool::complain(error.what(), 2);
  } catch (const Error& error) {
    return tool::complain(error.what(), tool::exit_code(error.code()));
  } catch (const std::bad_alloc&) {
    return tool::complain("out of memory; fewer tokens or a smaller layer would fit", 1);
  } catch (const std::exception& error) {
    return tool::complain(error.what(), 1);
  }
}
