// Runs lists of calls in a process of its own, for builds with a sanitizer: reads a list and its buffers from one file,
// and writes what the buffers then hold, and each call's message, to another. `kernels CALLS RESULTS` runs one list.
// Without arguments, each pair of lines of the input names two such files, and "done" is the answer.
//
// Calls: i32 count; each: text name, i64 seed, misalignment and shared_limit, i32 arguments. An argument is one byte and its value:
// 'i' i64, 'd' f64, 'b' a buffer, 'l' i32 count and so many buffers (their addresses are passed). A buffer: i64 bytes,
// i64 offset of its address from a multiple of 256, contents. Text: i32 bytes, bytes.
// Results: for each call its text (empty: no error), then its buffers' contents in order.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "entry.h"

namespace {

template <class T>
T take(std::istream& file) {
    T value;
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
}

std::string take_text(std::istream& file) {
    std::string text(take<int32_t>(file), '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    return text;
}

struct Buffer {
    void* base;
    char* contents;
    int64_t bytes;
};

// As many bytes as asked for and no more: the sanitizer guards what lies behind.
Buffer take_buffer(std::istream& file) {
    const auto bytes = take<int64_t>(file), offset = take<int64_t>(file);
    void* base = nullptr;
    if (posix_memalign(&base, 256, static_cast<size_t>(bytes + offset))) throw std::runtime_error("no memory");
    char* contents = static_cast<char*>(base) + offset;
    file.read(contents, bytes);
    return {base, contents, bytes};
}

using Entry = const char* (*)(const Argument*);

Entry find(const std::string& name) {
    void* entry = dlsym(RTLD_DEFAULT, name.c_str());
    if (!entry) throw std::runtime_error("there is no entry " + name);
    return reinterpret_cast<Entry>(entry);
}

void run_call(std::istream& calls, std::ostream& results) {
    const Entry entry = find(take_text(calls));
    Argument schedule[3];
    for (Argument& number : schedule) number.integer = take<int64_t>(calls);
    std::vector<Argument> arguments(take<int32_t>(calls));
    std::vector<Buffer> buffers;
    std::vector<std::vector<void*>> lists;
    lists.reserve(arguments.size());
    for (Argument& argument : arguments) {
        switch (take<char>(calls)) {
            case 'i':
                argument.integer = take<int64_t>(calls);
                break;
            case 'd':
                argument.number = take<double>(calls);
                break;
            case 'b':
                buffers.push_back(take_buffer(calls));
                argument.pointer = buffers.back().contents;
                break;
            default:
                lists.emplace_back();
                for (int32_t left = take<int32_t>(calls); left > 0; --left) {
                    buffers.push_back(take_buffer(calls));
                    lists.back().push_back(buffers.back().contents);
                }
                argument.pointer = lists.back().data();
        }
    }
    find("set_schedule")(schedule);
    const char* message = entry(arguments.data());
    const std::string text = message ? message : "";
    const auto size = static_cast<int32_t>(text.size());
    results.write(reinterpret_cast<const char*>(&size), sizeof size);
    results.write(text.data(), size);
    for (const Buffer& buffer : buffers) {
        results.write(buffer.contents, buffer.bytes);
        std::free(buffer.base);
    }
}

bool run_list(const std::string& from, const std::string& to) {
    std::ifstream calls(from, std::ios::binary);
    std::ofstream results(to, std::ios::binary);
    for (auto left = take<int32_t>(calls); left > 0; --left) run_call(calls, results);
    return !results.flush().fail();
}

}   // namespace

int main(int count, char** paths) {
    if (count == 3) return run_list(paths[1], paths[2]) ? 0 : 1;
    for (std::string calls, results; std::getline(std::cin, calls) && std::getline(std::cin, results);) {
        if (!run_list(calls, results)) return 1;
        std::cout << "done" << std::endl;
    }
    return 0;
}
