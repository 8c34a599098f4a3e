// Argument checks of native code, which reports errors by exceptions only: it never prints and never exits.
// Files that are compiled once per instruction set must not include this: the copies would share inline functions.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace nanochat {

// Throws std::invalid_argument, a ValueError in Python, with the parts of `message` if `holds` is false.
template <class... Parts>
void require(bool holds, const Parts&... message) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << message);
    throw std::invalid_argument(text.str());
}

}   // namespace nanochat
