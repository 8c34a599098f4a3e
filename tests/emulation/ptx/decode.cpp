// From the text of a kernel to instructions.
#include <algorithm>
#include <cstdio>
#include <set>

#include "ptx.h"
#include "text.h"

namespace ptx {

namespace {

constexpr int register_bytes(int bits) { return bits == 1 ? 4 : bits == 64 ? 256 : 128; }

struct Name {   // of a register, or of a parameter of a function that is called
    int offset, bits;
};

struct Operand {
    enum Kind { ignored, name, immediate, symbol, memory, vector } kind = ignored;
    Name at{};
    uint64_t value = 0;   // of an immediate
    std::string text;
    std::vector<Operand> parts;   // of a vector; coordinates beside an address
    int64_t offset = 0;           // of an address
    bool is_symbol = false;       // the address is a symbol's
};

class Decoder {
  public:
    Decoder(const Module& module, Kernel& kernel) : module_(module), kernel_(kernel) {}

    void decode_kernel() {
        const Module::Section& section = module_.entries.at(kernel_.name);
        const std::string header = module_.text.substr(section.start, section.body - section.start);
        int offset = 0;
        for (const Declaration& one : parameters_of(header, header.find('('))) {
            offset = round_up(offset, one.align ? one.align : one.bits / 8);
            kernel_.parameters.push_back({offset, one.bytes()});
            parameters_[one.name] = offset;
            offset += one.bytes();
        }
        kernel_.parameter_bytes = offset;
        if (const size_t at = header.find(".maxntid"); at != std::string::npos) {
            int x = 1, y = 1, z = 1;
            sscanf(header.c_str() + at + 8, "%d, %d, %d", &x, &y, &z);
            kernel_.max_threads = x * y * z;
        }
        if (const size_t at = header.find(".minnctapersm"); at != std::string::npos) {
            kernel_.min_blocks = std::atoi(header.c_str() + at + 13);
        }
        decode_body(section);
        while (!called_.empty()) {
            const std::string name = called_.back();
            called_.pop_back();
            decode_function(name);
        }
        for (const auto& [at, name] : jumps_) {
            const auto found = labels_.find(name);
            if (found == labels_.end()) fail("PTX line %d: no label '%s'", kernel_.code[at].line, name.c_str());
            kernel_.code[at].target = found->second;
        }
        kernel_.register_bytes = round_up(kernel_.register_bytes, 256);
        kernel_.counters.resize(kernel_.code.size());
    }

  private:
    struct Range {   // %r<72>
        std::string prefix;
        int first, count, bits;
    };
    struct Function {
        std::vector<int> arguments;
        int result = -1, link = -1;   // link: where the lanes return to
    };

    const Module& module_;
    Kernel& kernel_;
    std::vector<std::unordered_map<std::string, Name>> scopes_;
    std::vector<Range> ranges_;   // longer prefixes first
    std::unordered_map<std::string, int> labels_, parameters_, shared_, specials_;
    std::vector<std::pair<size_t, std::string>> jumps_;
    std::map<std::pair<int, uint64_t>, int> constants_;
    std::unordered_map<std::string, Function> functions_;
    std::vector<std::string> called_;
    const Function* function_ = nullptr;   // that is decoded; null: the kernel itself

    // The statement that is decoded.
    std::string statement_, opcode_, rest_;
    std::vector<std::string> words_;   // of the opcode
    Instruction now_;
    std::vector<Instruction> after_;   // conversions of its results
    int line_ = 0;
    size_t text_ = 0;
    Place place_, caller_;
    std::map<std::pair<int, int>, Place> callers_;   // of the places of functions that are inlined

    // --- registers, constants, names ---

    int allot(int bits, int count = 1) {
        if (bits != 1) kernel_.register_bytes = round_up(kernel_.register_bytes, 128);
        const int offset = kernel_.register_bytes;
        kernel_.register_bytes += register_bytes(bits) * count;
        return offset;
    }

    int constant(int bits, uint64_t value) {
        if (bits == 1) value = value ? 0xFFFFFFFF : 0;
        if (bits < 64) value &= bits == 16 ? 0xFFFF : 0xFFFFFFFF;
        if (bits == 16) bits = 32;
        const auto [found, is_new] = constants_.try_emplace({bits, value}, 0);
        if (is_new) {
            found->second = allot(bits);
            kernel_.constants.push_back({found->second, bits, value});
        }
        return found->second;
    }

    int special(const std::string& name, int bits) {
        const auto [found, is_new] = specials_.try_emplace(name, 0);
        if (is_new) {
            found->second = allot(bits);
            kernel_.specials.push_back({found->second, name});
        }
        return found->second;
    }

    bool find_name(const std::string& name, Name& result) {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
            const auto found = scope->find(name);
            if (found == scope->end()) continue;
            result = found->second;
            return true;
        }
        for (const Range& range : ranges_) {
            if (name.compare(0, range.prefix.size(), range.prefix) || !is_digit(name[range.prefix.size()])) continue;
            const int number = std::atoi(name.c_str() + range.prefix.size());
            if (number >= range.count) continue;
            result = {range.first + number * register_bytes(range.bits), range.bits};
            return true;
        }
        static const std::set<std::string> known = {"%tid",    "%ntid",   "%ctaid",          "%nctaid",
                                                    "%laneid", "%warpid", "%cluster_ctarank"};
        if (!known.count(name.substr(0, name.find('.')))) return false;
        result = {special(name, 32), 32};
        return true;
    }

    void declare_registers(const std::string& text) {   // .b32 %r<72>, or .pred p, q
        const Declaration declared(text);
        const size_t angle = text.find('<');
        if (angle != std::string::npos) {
            const int count = std::atoi(text.c_str() + angle + 1);
            ranges_.push_back({declared.name, allot(declared.bits, count), count, declared.bits});
            std::stable_sort(ranges_.begin(), ranges_.end(),
                             [](const Range& a, const Range& b) { return a.prefix.size() > b.prefix.size(); });
            return;
        }
        const size_t names = end_of_word(text, skip_space(text, 0));
        for (const std::string& name : split(text.substr(names), ',')) {
            scopes_.back()[trim(name)] = {allot(declared.bits), declared.bits};
        }
    }

    void declare_parameter(const std::string& text) {   // of a function that is called
        const Declaration declared(text);
        if (declared.bits != 64 || declared.count != 1) fail("PTX line %d: a parameter '%s'", line_, text.c_str());
        scopes_.back()[declared.name] = {allot(64), 64};
    }

    int place_shared(const std::string& name, int bytes, int align) {
        const auto [found, is_new] = shared_.try_emplace(name, 0);
        if (is_new) {
            found->second = round_up(kernel_.static_shared, align);
            kernel_.static_shared = found->second + bytes;
        }
        return found->second;
    }

    // --- operands ---

    // An instruction that converts an operand.
    Instruction added(Handler* run, int d, int a, int b = -1) {
        Instruction one;
        one.run = run;
        one.d = d;
        one.a = a;
        one.b = b;
        one.kind = Kind::added;
        return one;
    }

    size_t emit(Instruction one) {
        one.line = line_;
        one.text = text_;
        one.place = place_;
        one.caller = caller_;
        kernel_.code.push_back(one);
        return kernel_.code.size() - 1;
    }

    Operand parse(const std::string& text) {
        Operand operand;
        operand.text = text;
        if (text == "_") return operand;
        if (text[0] == '{') {
            operand.kind = Operand::vector;
            for (const std::string& part : split_operands(text.substr(1, text.size() - 2))) {
                operand.parts.push_back(parse(part));
            }
        } else if (text[0] == '[') {   // [base+offset, {coordinates}]
            const auto parts = split_operands(text.substr(1, text.size() - 2));
            const size_t plus = parts[0].find('+');
            const Operand base = parse(trim(parts[0].substr(0, plus)));
            operand.kind = Operand::memory;
            operand.text = base.text;
            operand.at = base.at;
            operand.is_symbol = base.kind == Operand::symbol;
            if (plus != std::string::npos) operand.offset = std::strtoll(parts[0].c_str() + plus + 1, nullptr, 0);
            for (size_t n = 1; n < parts.size(); ++n) operand.parts.push_back(parse(parts[n]));
        } else if (text[0] == '0' && text.size() > 2 && std::string("fFdD").find(text[1]) != std::string::npos) {
            operand.kind = Operand::immediate;   // the bits of a float or a double
            operand.value = std::strtoull(text.c_str() + 2, nullptr, 16);
        } else if (is_digit(text[0]) || text[0] == '-') {
            operand.kind = Operand::immediate;
            operand.value = text[0] == '-' ? static_cast<uint64_t>(std::strtoll(text.c_str(), nullptr, 0))
                                           : std::strtoull(text.c_str(), nullptr, 0);
        } else {
            operand.kind = find_name(text, operand.at) ? Operand::name : Operand::symbol;
        }
        return operand;
    }

    std::vector<Operand> operands() {
        std::vector<Operand> all;
        for (const std::string& part : split_operands(rest_)) all.push_back(parse(part));
        return all;
    }

    // The register that holds the address of a symbol.
    int symbol(const std::string& name, int bits) {
        const auto parameter = parameters_.find(name);
        if (parameter != parameters_.end()) {
            expect(bits == 64);
            const int result = allot(64), offset = constant(64, static_cast<uint64_t>(parameter->second));
            emit(added(handlers::add64, result, special("parameters", 64), offset));
            return result;
        }
        const auto known = module_.shared.find(name);
        if (known != module_.shared.end() && known->second.is_dynamic) {
            const int narrow = special("dynamic shared memory", 32);
            if (bits == 32) return narrow;
            const int wide = allot(64);
            emit(added(handlers::zero_extend, wide, narrow));
            return wide;
        }
        if (known != module_.shared.end()) {
            place_shared(name, known->second.bytes, known->second.align);
        } else if (!shared_.count(name)) {
            fail("PTX line %d: unknown symbol '%s'", line_, name.c_str());
        }
        return constant(bits, kSharedStart + static_cast<uint64_t>(shared_.at(name)));
    }

    // The register of an operand with so many bits. Conversions come before, or after_.
    int source(const Operand& operand, int bits) {
        if (operand.kind == Operand::immediate) return constant(bits, operand.value);
        if (operand.kind == Operand::symbol) return symbol(operand.text, bits);
        expect(operand.kind == Operand::name && (operand.at.bits == 1) == (bits == 1));
        if (operand.at.bits == bits) return operand.at.offset;
        const bool is_half = operand.at.bits == 64 && bits == 32;
        expect(is_half || (operand.at.bits == 32 && bits == 16));
        const int narrow = allot(bits);
        emit(added(is_half ? handlers::low32 : handlers::low16, narrow, operand.at.offset));
        return narrow;
    }
    int target(const Operand& operand, int bits) {
        expect(operand.kind == Operand::name && (operand.at.bits == 1) == (bits == 1));
        if (operand.at.bits == bits) return operand.at.offset;
        const bool is_half = operand.at.bits == 64 && bits == 32;
        expect(is_half || (operand.at.bits == 32 && bits == 16));
        const int narrow = allot(bits);
        after_.push_back(added(is_half ? handlers::zero_extend : handlers::move32, operand.at.offset, narrow));
        return narrow;
    }

    int target_or_none(const Operand& operand, int bits) {   // -1: it is _
        return operand.kind == Operand::ignored ? -1 : target(operand, bits);
    }

    // The registers of a vector, or of one operand.
    std::vector<int> sources(const Operand& operand, int bits) {
        std::vector<int> found;
        for (const Operand& part : parts_of(operand)) found.push_back(source(part, bits));
        return found;
    }
    std::vector<int> targets(const Operand& operand, int bits) {
        std::vector<int> found;
        for (const Operand& part : parts_of(operand)) found.push_back(target(part, bits));
        return found;
    }
    static std::vector<Operand> parts_of(const Operand& operand) {
        return operand.kind == Operand::vector ? operand.parts : std::vector<Operand>{operand};
    }

    // The register of an address, and now_.immediate.
    int address(const Operand& operand, int bits) {
        expect(operand.kind == Operand::memory);
        now_.immediate = operand.offset;
        if (operand.is_symbol) {
            const auto parameter = parameters_.find(operand.text);
            if (parameter == parameters_.end()) return symbol(operand.text, bits);
            now_.immediate += parameter->second;
            return special("parameters", 64);
        }
        Operand base = operand;
        base.kind = Operand::name;
        return source(base, bits);
    }
    int address_without_offset(const Operand& operand, int bits) {
        expect(operand.offset == 0);
        return address(operand, bits);
    }

    void set_list(const std::vector<int>& registers) {
        now_.list = static_cast<int>(kernel_.lists.size());
        now_.count = static_cast<int>(registers.size());
        kernel_.lists.insert(kernel_.lists.end(), registers.begin(), registers.end());
    }

    void expect(bool holds) const {
        if (!holds) fail("PTX line %d: unknown form of instruction '%s'", line_, statement_.c_str());
    }
    bool has_word(const char* word) const { return std::find(words_.begin(), words_.end(), word) != words_.end(); }
    int64_t number(const Operand& operand) const {
        expect(operand.kind == Operand::immediate);
        return static_cast<int64_t>(operand.value);
    }

    // --- bodies ---

    void decode_function(const std::string& name) {
        const Module::Section& section = module_.functions.at(name);
        const std::string header = module_.text.substr(section.start, section.body - section.start);
        Function& function = functions_.at(name);
        labels_[name] = static_cast<int>(kernel_.code.size());
        scopes_.assign(1, {});
        ranges_.clear();
        size_t open = header.find('(');
        if (function.result >= 0) {   // .func (.param .b64 result) name(...)
            scopes_[0][parameters_of(header, open)[0].name] = {function.result, 64};
            open = header.find('(', header.find(name));
        }
        size_t n = 0;
        for (const Declaration& one : parameters_of(header, open)) {
            if (one.bits != 64 || one.count != 1) fail("PTX: parameters of '%s'", name.c_str());
            scopes_[0][one.name] = {function.arguments[n++], 64};
        }
        function_ = &function;
        decode_body(section);
    }

    void decode_body(const Module::Section& section) {
        const std::string& text = module_.text;
        size_t counted = section.start;
        line_ = section.line;
        scopes_.emplace_back();
        for (size_t at = skip_space(text, section.body); at < section.end; at = skip_space(text, at)) {
            for (; counted < at; ++counted) line_ += text[counted] == '\n';
            text_ = at;
            if (text[at] == '{') {
                scopes_.emplace_back();
                ++at;
            } else if (text[at] == '}') {
                scopes_.pop_back();
                ++at;
            } else if (text[at] == '$') {
                const size_t colon = text.find(':', at);
                labels_[text.substr(at, colon - at)] = static_cast<int>(kernel_.code.size());
                at = colon + 1;
            } else if (text.compare(at, 4, ".loc") == 0) {
                const size_t end = text.find('\n', at);
                set_place(text.substr(at, end - at));
                at = end;
            } else {
                const size_t end = text.find(';', at);
                statement_ = text.substr(at, end - at);
                std::replace_if(statement_.begin(), statement_.end(), is_space, ' ');
                statement_ = trim(statement_);
                at = end + 1;
                decode_statement();
            }
        }
    }

    // .loc file line column, function_name L, inlined_at file line column
    void set_place(const std::string& loc) {
        sscanf(loc.c_str(), ".loc %d %d", &place_.file, &place_.line);
        caller_ = {};
        const size_t inlined = loc.find("inlined_at");
        const std::pair own(place_.file, place_.line);
        if (inlined == std::string::npos) {
            callers_.erase(own);
            return;
        }
        sscanf(loc.c_str() + inlined, "inlined_at %d %d", &caller_.file, &caller_.line);
        callers_[own] = caller_;
        for (int depth = 0; depth < 30; ++depth) {   // a function may be inlined into itself
            const auto outer = callers_.find({caller_.file, caller_.line});
            if (outer == callers_.end()) break;
            caller_ = outer->second;
        }
    }

    void decode_statement() {
        if (starts_with(statement_, ".reg")) {
            declare_registers(statement_.substr(4));
        } else if (starts_with(statement_, ".param")) {
            declare_parameter(statement_.substr(6));
        } else if (starts_with(statement_, ".shared")) {
            const Declaration declared(statement_.substr(7));
            place_shared(declared.name, declared.bytes(), declared.align);
        } else if (statement_[0] != '.') {
            decode_instruction();
        } else if (!starts_with(statement_, ".pragma")) {
            fail("PTX line %d: unknown directive '%s'", line_, statement_.c_str());
        }
    }

    void decode_instruction() {
        using Family = void (Decoder::*)();
        static const std::unordered_map<std::string, Family> families = {
            {"bra", &Decoder::branch},
            {"ret", &Decoder::leave},
            {"exit", &Decoder::leave},
            {"call", &Decoder::call},
            {"trap", &Decoder::trap},
            {"mov", &Decoder::move},
            {"cvta", &Decoder::convert_address},
            {"ld", &Decoder::access},
            {"st", &Decoder::access},
            {"ldmatrix", &Decoder::matrices},
            {"stmatrix", &Decoder::matrices},
            {"mma", &Decoder::mma},
            {"wgmma", &Decoder::wgmma},
            {"shfl", &Decoder::shuffle},
            {"vote", &Decoder::vote},
            {"elect", &Decoder::elect},
            {"bar", &Decoder::barrier},
            {"barrier", &Decoder::cluster_barrier},
            {"mapa", &Decoder::map_address},
            {"griddepcontrol", &Decoder::previous_grid},
            {"membar", &Decoder::fence},
            {"fence", &Decoder::fence},
            {"cp", &Decoder::copy},
            {"prefetch", &Decoder::prefetch},
            {"mbarrier", &Decoder::mbarrier},
            {"setmaxnreg", &Decoder::setmaxnreg},
            {"atom", &Decoder::atomic},
            {"red", &Decoder::reduction},
        };
        now_ = {};
        after_.clear();
        std::string text = statement_;
        if (text[0] == '@') {
            const size_t end = text.find(' ');
            now_.is_guard_inverted = text[1] == '!';
            const size_t start = 1 + now_.is_guard_inverted;
            const Operand guard = parse(text.substr(start, end - start));
            expect(guard.kind == Operand::name && guard.at.bits == 1);
            now_.guard = guard.at.offset;
            text = trim(text.substr(end));
        }
        const size_t end = std::min(text.find(' '), text.size());
        opcode_ = text.substr(0, end);
        rest_ = trim(text.substr(end));
        words_ = split(opcode_, '.');
        const auto family = families.find(words_[0]);
        if (family == families.end()) {
            arithmetic();
        } else {
            (this->*family->second)();
        }
        const size_t at = emit(now_);
        if (now_.run == handlers::wgmma) kernel_.has_wgmma = true;
        if (now_.run == handlers::load_acquire) kernel_.waits_for_blocks = true;
        if (now_.run == handlers::bra || now_.run == handlers::call) jumps_.push_back({at, jump_});
        for (Instruction& one : after_) {
            one.guard = now_.guard;
            one.is_guard_inverted = now_.is_guard_inverted;
            emit(one);
        }
    }
    std::string jump_;   // the label that now_ jumps to

    // --- families of instructions ---

    void set(Handler* run, Kind kind) {
        now_.run = run;
        now_.kind = kind;
    }

    void arithmetic() {
        const Form* form = find_form(opcode_);
        if (!form) fail("PTX line %d: unknown instruction '%s'", line_, statement_.c_str());
        const auto o = operands();
        const std::string places = form->places;
        expect(o.size() == places.size());
        int* const fields[] = {&now_.d, &now_.a, &now_.b, &now_.c, &now_.e};
        for (size_t n = 0; n < o.size(); ++n) {
            const int bits = places[n] == 'p' ? 1 : places[n] == 'h' ? 16 : places[n] == 'w' ? 32 : 64;
            *fields[n] = n == 0 ? target(o[n], bits) : source(o[n], bits);
        }
        set(form->run, form->kind);
    }

    void branch() {
        expect(opcode_ == "bra" || opcode_ == "bra.uni");
        jump_ = rest_;
        set(handlers::bra, Kind::branch);
    }

    void leave() {
        const bool returns = function_ && words_[0] == "ret";
        if (returns) now_.a = function_->link;
        set(returns ? handlers::ret : handlers::exit, Kind::branch);
    }

    void trap() { set(handlers::trap, Kind::branch); }

    void call() {   // (result), name, (arguments)
        const auto parts = split_operands(rest_);
        const bool has_result = parts[0][0] == '(';
        const std::string& name = parts[has_result];
        std::vector<std::string> arguments;
        if (parts.size() > 1u + has_result) {
            const std::string& list = parts[1 + has_result];
            arguments = split_operands(list.substr(1, list.size() - 2));
        }
        const auto [found, is_new] = functions_.try_emplace(name);
        Function& function = found->second;
        if (is_new) {
            if (!module_.functions.count(name)) fail("PTX line %d: no function '%s'", line_, name.c_str());
            function.link = allot(32);
            if (has_result) function.result = allot(64);
            for (size_t n = 0; n < arguments.size(); ++n) function.arguments.push_back(allot(64));
            called_.push_back(name);
        }
        expect(arguments.size() == function.arguments.size());
        for (size_t n = 0; n < arguments.size(); ++n) {
            emit(added(handlers::move64, function.arguments[n], source(parse(arguments[n]), 64)));
        }
        if (has_result) {
            const int result = target(parse(trim(parts[0].substr(1, parts[0].size() - 2))), 64);
            after_.push_back(added(handlers::move64, result, function.result));
        }
        now_.d = function.link;
        jump_ = name;
        set(handlers::call, Kind::branch);
    }

    void move() {
        const auto o = operands();
        expect(o.size() == 2);
        const int bits = bits_of_type(words_.back());
        if (o[1].kind == Operand::vector) {
            expect(o[1].parts.size() == 2 && bits >= 32);
            now_.d = target(o[0], bits);
            now_.a = source(o[1].parts[0], bits / 2);
            now_.b = source(o[1].parts[1], bits / 2);
            set(bits == 32 ? handlers::pack32 : handlers::pack64, Kind::move);
        } else if (o[0].kind == Operand::vector) {
            expect(o[0].parts.size() == 2 && bits >= 32);
            now_.d = target_or_none(o[0].parts[0], bits / 2);
            now_.b = target_or_none(o[0].parts[1], bits / 2);
            now_.a = source(o[1], bits);
            set(bits == 32 ? handlers::unpack32 : handlers::unpack64, Kind::move);
        } else {
            now_.d = target(o[0], bits);
            now_.a = source(o[1], bits);
            set(bits == 1 ? handlers::move_predicate : bits == 64 ? handlers::move64 : handlers::move32, Kind::move);
        }
    }

    // Addresses of global memory and of parameters are those of the host.
    void convert_address() {
        expect(opcode_ == "cvta.to.global.u64" || opcode_ == "cvta.global.u64" || opcode_ == "cvta.param.u64");
        move();
    }

    void access() {
        const auto o = operands();
        const bool is_store = words_[0] == "st", is_shared = has_word("shared"), is_parameter = has_word("param");
        expect(o.size() == 2);
        if (opcode_ == "ld.acquire.gpu.global.u32") {
            now_.d = target(o[0], 32);
            now_.a = address(o[1], 64);
            return set(handlers::load_acquire, Kind::atomic);
        }
        const Operand &memory = o[is_store ? 0 : 1], &data = o[is_store ? 1 : 0];
        expect(memory.kind == Operand::memory &&
               (is_shared || has_word("global") || (is_parameter && !is_store) || (is_parameter && !memory.is_symbol)));
        for (size_t n = 1; n + 1 < words_.size(); ++n) {
            static const std::set<std::string> allowed = {"global", "shared",   "param",   "v2",   "v4",
                                                          "nc",     "volatile", "relaxed", "weak", "gpu",
                                                          "cta",    "cs",       "cg",      "ca",   "cv"};
            expect(allowed.count(words_[n]) || starts_with(words_[n], "L1::") || starts_with(words_[n], "L2::"));
        }
        const std::string& type = words_.back();
        const int bits = bits_of_type(type);
        if (is_parameter && !memory.is_symbol && memory.text[0] != '%') {   // of a call
            expect(memory.offset == 0 && bits == 64);
            now_.d = is_store ? memory.at.offset : target(data, 64);
            now_.a = is_store ? source(data, 64) : memory.at.offset;
            set(handlers::move64, Kind::move);
            return;
        }
        std::vector<int> registers;
        for (const Operand& part : parts_of(data)) {
            registers.push_back(is_store ? stored(part, bits) : loaded(part, bits, type[0] == 's'));
        }
        set_list(registers);
        now_.a = address(memory, is_shared ? 32 : 64);
        now_.width = bits / 8 * now_.count;
        const Kind loads = is_shared ? Kind::shared_load : is_parameter ? Kind::parameter : Kind::global_load;
        set(find_access(is_shared, is_store, bits / 8, type[0] == 's', now_.count), !is_store   ? loads
                                                                                    : is_shared ? Kind::shared_store
                                                                                                : Kind::global_store);
        expect(now_.run);
    }
    // A load may widen, and a store may cut.
    int stored(const Operand& part, int bits) {
        if (part.kind == Operand::name && part.at.bits == 32 && bits < 32) return part.at.offset;
        return source(part, std::max(bits, 16));
    }
    int loaded(const Operand& part, int bits, bool is_signed) {
        if (part.kind == Operand::name && part.at.bits == 32 && bits < 32) return part.at.offset;
        if (part.kind == Operand::name && part.at.bits == 64 && bits < 64) {
            expect(bits == 32 || !is_signed);
            const int narrow = allot(32);
            after_.push_back(added(is_signed ? handlers::sign_extend : handlers::zero_extend, part.at.offset, narrow));
            return narrow;
        }
        return target_or_none(part, std::max(bits, 16));
    }

    void matrices() {
        const auto o = operands();
        const bool is_store = words_[0] == "stmatrix";
        expect(o.size() == 2 && has_word("m8n8") && has_word("b16") && has_word("aligned"));
        now_.a = address(o[!is_store], 32);
        set_list(is_store ? sources(o[1], 32) : targets(o[0], 32));
        expect(now_.count == (has_word("x4") ? 4 : has_word("x2") ? 2 : 1) && after_.empty());
        now_.width = has_word("trans");
        now_.is_aligned = true;
        set(is_store ? handlers::stmatrix : handlers::ldmatrix, Kind::ldmatrix);
    }

    void mma() {
        const bool is_half = opcode_ == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32";
        expect(is_half || opcode_ == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
        const auto o = operands();
        expect(o.size() == 4);
        std::vector<int> registers = targets(o[0], 32);
        for (int n = 1; n < 4; ++n) {
            const auto more = sources(o[n], 32);
            registers.insert(registers.end(), more.begin(), more.end());
        }
        set_list(registers);
        expect(now_.count == 4 + 4 + 2 + 4);
        now_.width = is_half;
        now_.is_aligned = true;
        set(handlers::mma, Kind::tensor);
    }

    // immediate: the bits transposed A, transposed B, float16, A in registers.
    void wgmma() {
        now_.is_aligned = true;
        if (opcode_ == "wgmma.fence.sync.aligned") return set(handlers::wgmma_fence, Kind::sync);
        if (opcode_ == "wgmma.commit_group.sync.aligned") return set(handlers::wgmma_commit, Kind::sync);
        const auto o = operands();
        if (opcode_ == "wgmma.wait_group.sync.aligned") {
            now_.immediate = number(o[0]);
            return set(handlers::wgmma_wait, Kind::sync);
        }
        expect(starts_with(opcode_, "wgmma.mma_async.sync.aligned.") && words_.size() == 8 && words_[5] == "f32");
        expect(words_[6] == words_[7] && (words_[6] == "f16" || words_[6] == "bf16"));
        int N = 0, K = 0;
        expect(sscanf(words_[4].c_str(), "m64n%dk%d", &N, &K) == 2 && K == 16 && N % 8 == 0 && N >= 8 && N <= 256);
        const bool in_registers = o[1].kind == Operand::vector;
        expect(o.size() == (in_registers ? 7 : 8));
        std::vector<int> registers = targets(o[0], 32);
        expect(static_cast<int>(registers.size()) == N / 2);
        if (in_registers) {
            const auto more = sources(o[1], 32);
            expect(more.size() == 4);
            registers.insert(registers.end(), more.begin(), more.end());
        } else {
            now_.a = source(o[1], 64);
        }
        now_.b = source(o[2], 64);
        now_.c = source(o[3], 1);
        const int64_t transposed_a = in_registers ? 0 : number(o[6]), transposed_b = number(o.back());
        expect(number(o[4]) == 1 && number(o[5]) == 1 && transposed_a >> 1 == 0 && transposed_b >> 1 == 0);
        expect(after_.empty());
        now_.immediate = transposed_a | transposed_b << 1 | (words_[6] == "f16") << 2 | in_registers << 3;
        now_.width = N;
        set_list(registers);
        set(handlers::wgmma, Kind::tensor);
    }

    // width: up, down, bfly, idx
    void shuffle() {
        const auto parts = split_operands(rest_);
        expect(parts.size() == 5 && words_.size() == 4 && words_[1] == "sync" && words_[3] == "b32");
        const auto results = split(parts[0], '|');
        now_.d = target(parse(trim(results[0])), 32);
        if (results.size() > 1) now_.e = target(parse(trim(results[1])), 1);
        now_.a = source(parse(parts[1]), 32);
        now_.b = source(parse(parts[2]), 32);
        now_.c = source(parse(parts[3]), 32);
        now_.members = source(parse(parts[4]), 32);
        static const char* const modes[] = {"up", "down", "bfly", "idx"};
        now_.width = static_cast<int>(std::find(modes, modes + 4, words_[2]) - modes);
        expect(now_.width < 4);
        set(handlers::shfl, Kind::shuffle);
    }

    // width: all, any, ballot
    void vote() {
        const auto o = operands();
        static const char* const modes[] = {"all", "any", "ballot"};
        now_.width = static_cast<int>(std::find(modes, modes + 3, words_[2]) - modes);
        expect(o.size() == 3 && words_[1] == "sync" && now_.width < 3);
        now_.d = target(o[0], now_.width == 2 ? 32 : 1);
        now_.a = source(o[1], 1);
        now_.members = source(o[2], 32);
        set(handlers::vote, Kind::shuffle);
    }

    void elect() {   // _|p, membermask
        const auto parts = split_operands(rest_);
        const auto results = split(parts[0], '|');
        expect(opcode_ == "elect.sync" && results.size() == 2 && parts.size() == 2);
        now_.d = target(parse(trim(results[1])), 1);
        now_.members = source(parse(parts[1]), 32);
        set(handlers::elect, Kind::shuffle);
    }

    void barrier() {
        const auto o = operands();
        if (opcode_ == "bar.warp.sync") {
            now_.members = source(o[0], 32);
            return set(handlers::nothing, Kind::sync);
        }
        const bool waits = opcode_ == "bar.sync";
        expect((waits && o.size() <= 2) || (opcode_ == "bar.arrive" && o.size() == 2));
        now_.a = source(o[0], 32);
        if (o.size() > 1) now_.b = source(o[1], 32);
        now_.is_aligned = true;
        set(waits ? handlers::bar_sync : handlers::bar_arrive, Kind::sync);
    }

    void cluster_barrier() {
        const bool waits = opcode_ == "barrier.cluster.wait.aligned";
        expect(waits || opcode_ == "barrier.cluster.arrive.aligned");
        now_.is_aligned = true;
        set(waits ? handlers::cluster_wait : handlers::cluster_arrive, Kind::sync);
    }

    void map_address() {
        const auto o = operands();
        expect(opcode_ == "mapa.shared::cluster.u32" && o.size() == 3);
        now_.d = target(o[0], 32);
        now_.a = source(o[1], 32);
        now_.b = source(o[2], 32);
        set(handlers::map_address, Kind::integer);
    }

    void previous_grid() {
        const bool waits = opcode_ == "griddepcontrol.wait";
        expect(waits || opcode_ == "griddepcontrol.launch_dependents");
        set(waits ? handlers::wait_for_previous : handlers::nothing, Kind::sync);
    }

    void fence() {
        if (opcode_ == "fence.proxy.async" || opcode_ == "fence.proxy.async.shared::cta") {
            return set(handlers::fence_proxy, Kind::sync);
        }
        if (opcode_ == "fence.proxy.async.global") return set(handlers::fence_proxy_global, Kind::sync);
        expect(words_[1] != "proxy");
        const bool is_of_mbarriers = opcode_ == "fence.mbarrier_init.release.cluster";
        set(is_of_mbarriers ? handlers::fence_mbarrier : handlers::nothing, Kind::sync);
    }

    void copy() {
        if (starts_with(opcode_, "cp.async.bulk.tensor.") || starts_with(opcode_, "cp.reduce.async.bulk.tensor.")) {
            return tensor_copy();
        }
        const auto o = operands();
        const bool is_addition = opcode_ == "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32";
        if (is_addition || opcode_ == "cp.async.bulk.global.shared::cta.bulk_group") {
            expect(o.size() == 3);
            now_.a = address_without_offset(o[0], 64);
            now_.d = address_without_offset(o[1], 32);
            now_.b = source(o[2], 32);
            now_.width = is_addition;
            return set(handlers::bulk_store, Kind::copy);
        }
        if (opcode_ == "cp.async.cg.shared.global") {
            expect(o.size() >= 3 && number(o[2]) == 16);
            now_.d = address_without_offset(o[0], 32);
            now_.a = address(o[1], 64);
            now_.b = o.size() > 3 ? source(o[3], 32) : constant(32, 16);
            return set(handlers::cp_async, Kind::copy);
        }
        static const std::unordered_map<std::string, Handler*> groups = {
            {"cp.async.commit_group", handlers::cp_async_commit},
            {"cp.async.wait_group", handlers::cp_async_wait},
            {"cp.async.wait_all", handlers::cp_async_wait},
            {"cp.async.bulk.commit_group", handlers::tensor_commit},
            {"cp.async.bulk.wait_group", handlers::tensor_wait},
            {"cp.async.bulk.wait_group.read", handlers::tensor_wait},
        };
        const auto found = groups.find(opcode_);
        expect(found != groups.end());
        now_.immediate = o.empty() ? -1 : number(o[0]);   // groups that may be in flight; -1: nor the open one
        now_.width = has_word("read");
        set(found->second, Kind::sync);
    }

    void tensor_copy() {
        const auto o = operands();
        const bool is_addition = words_[1] == "reduce";
        const size_t rank_word = is_addition ? 5 : 4;
        std::string tail;
        for (size_t n = rank_word + 1; n < words_.size(); ++n) tail += "." + words_[n];
        const std::string load = ".shared::cluster.global.mbarrier::complete_tx::bytes";
        const bool is_multicast = !is_addition && tail == load + ".multicast::cluster";
        const bool is_load = is_multicast || (!is_addition && tail == load);
        expect(is_load ||
               tail == (is_addition ? ".global.shared::cta.add.tile.bulk_group" : ".global.shared::cta.bulk_group"));
        expect(o.size() == 2u + is_load + is_multicast);
        const Operand &tensor = o[is_load], &shared = o[!is_load];
        expect(tensor.parts.size() == 1);
        now_.a = address_without_offset(tensor, 64);
        now_.d = address_without_offset(shared, 32);
        if (is_load) now_.b = address_without_offset(o[2], 32);
        if (is_multicast) now_.c = source(o[3], 16);
        set_list(sources(tensor.parts[0], 32));
        expect(now_.count == words_[rank_word][0] - '0');
        now_.width = is_addition;
        set(is_load ? handlers::tensor_load : handlers::tensor_store, Kind::copy);
    }

    void prefetch() {
        expect(opcode_ == "prefetch.tensormap");
        now_.a = address(operands()[0], 64);
        set(handlers::tensor_prefetch, Kind::copy);
    }

    void mbarrier() {
        const auto o = operands();
        if (opcode_ == "mbarrier.init.shared::cta.b64") {
            now_.a = address(o[0], 32);
            now_.b = source(o[1], 32);
            return set(handlers::mbarrier_init, Kind::sync);
        }
        if (opcode_ == "mbarrier.try_wait.parity.shared::cta.b64") {
            expect(o.size() == 3);
            now_.d = target(o[0], 1);
            now_.a = address(o[1], 32);
            now_.b = source(o[2], 32);
            return set(handlers::mbarrier_try_wait, Kind::sync);
        }
        const bool expects_bytes = opcode_ == "mbarrier.arrive.expect_tx.shared::cta.b64";
        const bool is_remote = opcode_ == "mbarrier.arrive.release.cluster.shared::cluster.b64";
        expect(expects_bytes || is_remote || opcode_ == "mbarrier.arrive.shared::cta.b64");
        expect(o.size() == 2u + expects_bytes && o[0].kind == Operand::ignored);
        now_.a = address(o[1], 32);
        if (expects_bytes) now_.b = source(o[2], 32);
        set(is_remote ? handlers::mbarrier_arrive_remote : handlers::mbarrier_arrive, Kind::sync);
    }

    void setmaxnreg() {
        now_.is_aligned = true;
        now_.immediate = number(operands()[0]);
        now_.width = words_[1] == "inc";
        set(handlers::setmaxnreg, Kind::sync);
    }

    void atomic() {
        const auto o = operands();
        expect(o.size() >= 3);
        now_.d = target(o[0], 32);
        now_.a = address(o[1], 64);
        now_.b = source(o[2], 32);
        if (o.size() > 3) now_.c = source(o[3], 32);
        set(find_atomic(opcode_), Kind::atomic);
        expect(now_.run);
    }

    void reduction() {
        const auto o = operands();
        expect(opcode_ == "red.release.gpu.global.add.u32" && o.size() == 2);
        now_.a = address(o[0], 64);
        now_.b = source(o[1], 32);
        set(handlers::add_release, Kind::atomic);
    }
};

}   // namespace

std::string Kernel::text_of(const Instruction& i) const {
    const size_t end = std::min(module->text.find(';', i.text), i.text + 110);
    std::string text = module->text.substr(i.text, end - i.text);
    std::replace_if(text.begin(), text.end(), is_space, ' ');
    return text;
}

std::string Kernel::place_of(const Instruction& i) const {
    std::string text = "PTX line " + std::to_string(i.line);
    for (const Place& place : {i.place, i.caller}) {
        const auto file = module->files.find(place.file);
        if (file != module->files.end()) text += ", " + file->second + ":" + std::to_string(place.line);
    }
    return text;
}

Kernel& Module::kernel(const std::string& name) {
    std::unique_ptr<Kernel>& kernel = kernels[name];
    if (!kernel) {
        if (!entries.count(name)) fail("PTX: no entry '%s'", name.c_str());
        auto made = std::make_unique<Kernel>();
        made->name = name;
        made->module = this;
        Decoder(*this, *made).decode_kernel();
        kernel = std::move(made);
    }
    return *kernel;
}

}   // namespace ptx
