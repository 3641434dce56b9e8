/* The text of PTX becomes kernels, and a kernel's text its instructions. */
#include "ptx.h"

#include <algorithm>
#include <map>
#include <sstream>
#include <string.h>

namespace ptx {

/* ---- a file ---- */

std::string read(const std::string &file, const std::string &text, module &to) {
    enum { OUTSIDE, HEAD, BODY } place = OUTSIDE;
    std::istringstream lines(text);
    std::string line;
    for (unsigned number = 1; std::getline(lines, line); number++) {
        char name[256];
        size_t align, bytes;
        if (sscanf(line.c_str(), ".target sm_%d", &to.target) == 1)
            continue;
        if (sscanf(line.c_str(), " .visible .entry %255[^( ]", name) == 1) {
            to.kernels.emplace_back();
            to.kernels.back().name = name, to.kernels.back().file = file;
            place = HEAD;
        } else if (place == HEAD && line == "{") {
            to.kernels.back().line = number + 1;
            place = BODY;
        } else if (place == HEAD
                   && sscanf(line.c_str(), " .param .align %zu .b8 %*[^[][%zu]", &align, &bytes) == 2) {
            if (to.kernels.back().params)
                return file + ":" + std::to_string(number) + ": expected one parameter, found a second one";
            to.kernels.back().params = bytes;
        } else if (place == BODY && line == "}") {
            place = OUTSIDE;
        } else if (place == BODY) {
            kernel &k = to.kernels.back();
            if (sscanf(line.c_str(), " .shared .align %zu .b8 %*[^[][%zu]", &align, &bytes) == 2) {
                if (k.shared)
                    return file + ":" + std::to_string(number)
                           + ": expected one block of shared memory, found a second one";
                k.shared = bytes, k.align = align;
            }
            k.text += line + '\n';
        }
    }
    if (!to.target || to.kernels.empty() || place != OUTSIDE)
        return file + ": expected PTX with a .target and kernels, found none, or a part of it";
    return "";
}

/* ---- a kernel ---- */

namespace {

const char *const specials[] = { "%tid.x",    "%ctaid.x",  "%ctaid.y",  "%ctaid.z", "%ntid.x",
                                 "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid" };

const char *const spaces[] = { "", "global", "shared", "local", "param" };

bool ends_with(const std::string &s, const char *end) {
    return s.size() >= strlen(end) && !s.compare(s.size() - strlen(end), std::string::npos, end);
}

struct decoder {
    kernel &k;
    unsigned line;
    std::map<std::string, uint16_t> slots;
    std::map<std::string, int32_t> labels;
    std::vector<std::pair<size_t, std::string>> branches; /* which instruction goes to which label */

    explicit decoder(kernel &of) : k(of), line(of.line) {}

    /* The value of a number or of a variable's name. */
    bool constant(const std::string &s, uint64_t *value) const {
        char *end;
        if (s[0] == '0' && s.size() > 2 && strchr("fFdD", s[1]))
            *value = strtoull(s.c_str() + 2, &end, 16);
        else if (s[0] == '-' || (s[0] >= '0' && s[0] <= '9'))
            *value = s[0] == '-' ? (uint64_t)strtoll(s.c_str(), &end, 0) : strtoull(s.c_str(), &end, 0);
        else if (s == k.name + "_param_0")
            return *value = PARAM_AT, true;
        else if (s.compare(0, 2, "_Z") == 0 && k.shared)
            return *value = shared_at(k), true;
        else if (s.compare(0, 13, "__local_depot") == 0)
            return *value = LOCAL_AT, true;
        else
            return false;
        return !*end || !strcmp(end, "U");
    }

    /* A slot for what is named for the first time, the same one from then on. */
    bool slot(const std::string &name, uint16_t *found) {
        const auto known = slots.find(name);
        if (known != slots.end())
            return *found = known->second, true;
        start s = { (uint16_t)k.slots, -1, 0 };
        const auto special = std::find(std::begin(specials), std::end(specials), name);
        if (special != std::end(specials))
            s.special = (int8_t)(special - std::begin(specials));
        else if (name.empty() || (name[0] != '%' && !constant(name, &s.value)) || k.slots > UINT16_MAX)
            return false;
        if (name[0] != '%' || s.special >= 0)
            k.starts.push_back(s);
        *found = slots[name] = (uint16_t)k.slots++;
        return true;
    }

    /* Operands in their order: names, and what is in brackets as a name and an offset. */
    bool operands(const std::string &s, instruction &i) {
        size_t n = 0, addresses = 0;
        for (size_t at = 0; at < s.size();) {
            const size_t end = std::min(s.find_first_of(" \t,|{}[]", at), s.size());
            const std::string name = s.substr(at, end - at);
            const bool address = at && s[at - 1] == '[';
            const size_t plus = address ? name.find('+') : std::string::npos;
            if (address && addresses == 2)
                return false;
            if (plus != std::string::npos)
                i.offset[addresses] = (int32_t)strtol(name.c_str() + plus + 1, NULL, 0);
            addresses += address;
            if (end > at && (n == OPERANDS || !slot(name.substr(0, plus), &i.slot[n++])))
                return false;
            at = end + 1;
        }
        return true;
    }

    /* The name of a handler: loads and stores without their space, moves of pairs with their side. */
    static std::string handler_name(const std::string &op, const std::string &rest, instruction &i) {
        std::istringstream parts(op);
        std::string name, part;
        std::getline(parts, name, '.');
        if (name == "mov" && rest.find('{') != std::string::npos)
            return op + (rest[0] == '{' ? ".split" : ".join");
        if (name != "ld" && name != "st")
            return op;
        while (std::getline(parts, part, '.')) {
            const auto space = std::find(std::begin(spaces), std::end(spaces), part);
            if (space != std::end(spaces))
                i.in = (ptx::space)(space - std::begin(spaces));
            else if (part != "nc" && part != "volatile")
                name += "." + part;
        }
        return name;
    }

    void add(const std::string &op, const std::string &rest) {
        instruction i = {};
        i.line = line;
        if (op == "bra" || op == "bra.uni") {
            branches.emplace_back(k.code.size(), rest);
            i.run = find_handler("bra");
        } else {
            i.run = find_handler(handler_name(op, rest, i));
            if (!i.run || !operands(rest, i))
                i.run = unknown();
        }
        k.code.push_back(i);
    }

    void guard(const std::string &predicate) { /* @%p or @!%p */
        instruction i = {};
        const bool negated = predicate[1] == '!';
        i.line = line;
        i.run = slot(predicate.substr(negated ? 2 : 1), &i.slot[0]) ? skip_unless(!negated) : unknown();
        k.code.push_back(i);
    }

    void declaration(const std::string &s) {
        sscanf(s.c_str(), ".local .align %*u .b8 %*[^[][%zu]", &k.local);
    }

    /* Between two semicolons. */
    void statement(std::string s) {
        s.erase(0, s.find_first_not_of(" \t{}"));
        s.erase(s.find_last_not_of(" \t") + 1);
        if (s.empty())
            return;
        if (s[0] == '.')
            return declaration(s);
        if (s[0] == '@') {
            const size_t end = s.find_first_of(" \t");
            guard(s.substr(0, end));
            s.erase(0, s.find_first_not_of(" \t", end));
        }
        const size_t end = std::min(s.find_first_of(" \t"), s.size());
        const size_t rest = s.find_first_not_of(" \t", end);
        add(s.substr(0, end), rest == std::string::npos ? "" : s.substr(rest));
    }

    void text() {
        std::istringstream lines(k.text);
        std::string one, open;
        for (; std::getline(lines, one); line++) {
            one.erase(std::min(one.find("//"), one.size()));
            if (ends_with(one, ":")) {
                labels[one.substr(0, one.size() - 1)] = (int32_t)k.code.size();
                continue;
            }
            for (size_t end; (end = one.find(';')) != std::string::npos; one.erase(0, end + 1)) {
                statement(open + one.substr(0, end));
                open.clear();
            }
            open += one.find_first_not_of(" \t}") == std::string::npos ? "" : one;
        }
        for (const auto &[at, label] : branches) {
            const auto to = labels.find(label);
            if (to == labels.end())
                k.code[at].run = unknown();
            else
                k.code[at].offset[0] = to->second;
        }
    }
};

}

void decode(kernel &k) { decoder(k).text(); }

}
