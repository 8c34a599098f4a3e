// Parts of PTX text.
#pragma once

#include <cctype>
#include <cstdlib>
#include <string>
#include <vector>

namespace ptx {

inline bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)); }
inline bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)); }
inline bool is_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

inline bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

inline std::string trim(const std::string& text) {
    size_t start = 0, end = text.size();
    while (start < end && is_space(text[start])) ++start;
    while (end > start && is_space(text[end - 1])) --end;
    return text.substr(start, end - start);
}

// The next place that is neither space nor comment.
inline size_t skip_space(const std::string& text, size_t at) {
    for (;;) {
        while (at < text.size() && is_space(text[at])) ++at;
        if (text.compare(at, 2, "//")) return at;
        while (at < text.size() && text[at] != '\n') ++at;
    }
}

inline size_t end_of_word(const std::string& text, size_t at) {
    while (at < text.size() && is_word(text[at])) ++at;
    return at;
}

inline std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts(1);
    for (char c : text) {
        if (c == separator) {
            parts.emplace_back();
        } else {
            parts.back().push_back(c);
        }
    }
    return parts;
}

// The parts between the commas that are in no brackets.
inline std::vector<std::string> split_operands(const std::string& text) {
    std::vector<std::string> parts;
    std::string part;
    int depth = 0;
    for (char c : text) {
        depth += c == '{' || c == '[' || c == '(';
        depth -= c == '}' || c == ']' || c == ')';
        if (c == ',' && depth == 0) {
            parts.push_back(trim(part));
            part.clear();
        } else {
            part += c;
        }
    }
    if (!trim(part).empty()) parts.push_back(trim(part));
    return parts;
}

// ".b32" has 32, ".pred" 1.
inline int bits_of_type(const std::string& type) {
    if (type == "pred") return 1;
    const size_t digits = type.find_first_of("0123456789");
    return digits == std::string::npos ? 0 : std::atoi(type.c_str() + digits);
}

// What follows the word of the space: .align 8 .b8 name[48]
struct Declaration {
    int align = 0, bits = 0;
    int64_t count = 1;
    std::string name;

    explicit Declaration(const std::string& text) {
        for (size_t at = skip_space(text, 0); at < text.size(); at = skip_space(text, at)) {
            size_t end = at + 1;
            while (end < text.size() && is_word(text[end]) && text[end] != '.') ++end;
            const std::string word = text.substr(at, end - at);
            if (word == ".align") {
                align = std::atoi(text.c_str() + end);
                end = end_of_word(text, skip_space(text, end));
            } else if (word[0] == '.') {
                const int given = bits_of_type(word.substr(1));
                if (given) bits = given;   // not .ptr, .global
            } else {
                name = word;
                end = skip_space(text, end);
                if (end < text.size() && text[end] == '[') count = std::atoll(text.c_str() + end + 1);
                return;
            }
            at = end;
        }
    }
    int bytes() const { return static_cast<int>(count * bits / 8); }
};

// The declarations of the parameters in "name(.param .b64 a, .param .b64 b)", from the opening bracket on.
inline std::vector<Declaration> parameters_of(const std::string& header, size_t open) {
    std::vector<Declaration> found;
    if (open == std::string::npos) return found;
    for (const std::string& part : split(header.substr(open + 1, header.find(')', open) - open - 1), ',')) {
        if (!trim(part).empty()) found.emplace_back(part.substr(part.find(".param") + 6));
    }
    return found;
}

inline int round_up(int value, int multiple) { return multiple ? (value + multiple - 1) / multiple * multiple : value; }

}   // namespace ptx
