// The PTX of a library: from the fat binary to the text of its functions.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "ptx.h"
#include "text.h"

namespace ptx {

void fail(const char* format, ...) {
    char text[4000];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    throw std::runtime_error(text);
}

namespace {

#pragma pack(push, 1)
struct FatHeader {
    static constexpr uint32_t kMagic = 0xBA55ED50;
    uint32_t magic;
    uint16_t version, header_size;
    uint64_t size;
};
struct FatEntry {
    static constexpr uint16_t kPtx = 1;
    static constexpr uint64_t kCompressed = 0xA000;
    uint16_t kind, version;
    uint32_t header_size;
    uint64_t size;
    uint32_t compressed_size, options_offset;
    uint16_t minor, major;
    uint32_t architecture, name_offset, name_length;
    uint64_t flags, zero, decompressed_size;
};
#pragma pack(pop)

}   // namespace

std::string find_ptx(const void* fat_binary) {
    const auto* header = static_cast<const FatHeader*>(fat_binary);
    if (header->magic != FatHeader::kMagic) fail("fat binary: magic 0x%x", header->magic);
    const char* at = static_cast<const char*>(fat_binary) + header->header_size;
    for (const char* const end = at + header->size; at < end;) {
        FatEntry entry;
        memcpy(&entry, at, sizeof entry);
        at += entry.header_size;
        if (entry.kind == FatEntry::kPtx) {
            if (entry.flags & FatEntry::kCompressed) fail("fat binary: compressed PTX; build with -no-compress");
            return {at, strnlen(at, entry.size)};
        }
        at += entry.size;
    }
    fail("fat binary: no PTX");
}

Module::Module(std::string source) : text(std::move(source)) {
    size_t counted = 0;
    int line = 1;
    const auto line_at = [&](size_t at) {
        for (; counted < at; ++counted) line += text[counted] == '\n';
        return line;
    };
    for (size_t at = skip_space(text, 0); at < text.size(); at = skip_space(text, at)) {
        const size_t start = at, end = end_of_word(text, at);
        const std::string word = text.substr(start, end - start);
        const size_t end_of_line = std::min(text.find('\n', at), text.size());
        const std::string rest = trim(text.substr(end, end_of_line - end));
        at = end_of_line;
        if (word == ".version" || word == ".address_size") {
        } else if (word == ".file") {   // 1 "folder/name.cu"
            const size_t quote = rest.rfind('"'), slash = rest.rfind('/'), first = rest.find('"');
            const size_t name = slash == std::string::npos ? first + 1 : slash + 1;
            files[std::atoi(rest.c_str())] = rest.substr(name, quote - name);
        } else if (word == ".target") {   // sm_90a
            architecture = std::atoi(rest.c_str() + 3);
        } else if (word == ".visible" || word == ".weak") {
            at = end;
        } else if (word == ".extern" || word == ".shared") {
            const size_t space = word == ".shared" ? start : skip_space(text, end), semicolon = text.find(';', start);
            if (text.compare(space, 7, ".shared")) fail("PTX line %d: .extern %s", line_at(start), rest.c_str());
            const Declaration declared(text.substr(space + 7, semicolon - space - 7));
            shared[declared.name] = {declared.bytes(), declared.align, word == ".extern"};
            at = semicolon + 1;
        } else if (word == ".section") {
            at = text.find('}', start) + 1;
        } else if (word == ".entry" || word == ".func") {
            const size_t body = text.find_first_of("{;", start);
            at = body + 1;
            if (text[body] == ';') continue;   // a declaration
            for (int depth = 1; depth; ++at) depth += (text[at] == '{') - (text[at] == '}');
            size_t name = skip_space(text, end);
            if (text[name] == '(') name = skip_space(text, text.find(')', name) + 1);   // of the result
            auto& sections = word == ".entry" ? entries : functions;
            sections[text.substr(name, end_of_word(text, name) - name)] = {start, body + 1, at - 1, line_at(start)};
        } else {
            fail("PTX line %d: unknown directive '%s'", line_at(start), text.substr(start, 60).c_str());
        }
    }
}

}   // namespace ptx
