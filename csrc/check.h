// How native code refuses: it throws, with what it got and what it takes; it never prints and never exits.
// Not for the files that are compiled once per instruction set: inline functions are shared between their copies.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace nanochat {

// For arguments: the caller sees a ValueError.
template <class... Parts>
void require(bool holds, const Parts&... message) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << message);
    throw std::invalid_argument(text.str());
}

}   // namespace nanochat
