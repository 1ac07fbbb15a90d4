// SPDX-License-Identifier: Apache-2.0
// What find_package gives is enough to compile, link and run: the version in the header is the one
// in the library.
#include <moesaic/moesaic.h>

#include <cstdio>

int main() {
  std::printf("moesaic %s\n", moesaic::version().c_str());
  return moesaic::version() == MOESAIC_VERSION_STRING ? 0 : 1;
}
