// Collects the errors of a launch, and turns instruction addresses into source lines.
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <map>

#include "state.h"

namespace emu {
namespace {

struct Pending {
  Report report;
  const void* address;
  const void* other;
};
std::vector<Pending> pending;
std::vector<Report> last;
std::map<const void*, std::string> known_lines;

constexpr size_t kMostReports = 20;  // in one error's text

// Frames in these files are wrappers, not their callers.
bool is_wrapper(const std::string& line) {
  for (const char* file : {"portable.cuh:", "async.cuh:", "matrix.cuh:", "tile.cuh:", "builtins.h:"})
    if (line.rfind(file, 0) == 0) return true;
  return false;
}

std::string join_frames(const std::vector<std::string>& frames) {
  std::string text;
  for (const std::string& frame : frames)
    if (!is_wrapper(frame) || frames.size() == 1) text += (text.empty() ? "" : " < ") + frame;
  return text;
}

// A process of addr2line for many questions, as reading the file takes longer than an answer.
struct Addr2line {
  pid_t asker;  // a fork starts its own process
  std::FILE *questions, *answers;
};

Addr2line start_addr2line(const char* file) {
  int questions[2], answers[2];
  if (pipe2(questions, O_CLOEXEC) || pipe2(answers, O_CLOEXEC)) throw Error("no pipe to addr2line");
  if (fork() == 0) {
    dup2(questions[0], 0);
    dup2(answers[1], 1);
    dup2(open("/dev/null", O_WRONLY), 2);
    execlp("addr2line", "addr2line", "-a", "-i", "-s", "-e", file, nullptr);
    _exit(1);
  }
  close(questions[0]);
  close(answers[1]);
  return {getpid(), fdopen(questions[1], "w"), fdopen(answers[0], "r")};
}

// Asks addr2line about addresses of one loaded file. A question about 0, which is no code, ends each answer.
void look_up(const char* file, const char* base, const std::vector<const void*>& addresses) {
  static std::map<std::string, Addr2line> running;
  const auto found = running.find(file);
  if (found == running.end() || found->second.asker != getpid()) running[file] = start_addr2line(file);
  const Addr2line& process = running[file];
  for (const void* address : addresses) {
    const size_t inside_the_call = static_cast<const char*>(address) - base - 1;
    std::fprintf(process.questions, "0x%zx\n0x0\n", inside_the_call);
    std::fflush(process.questions);
    std::vector<std::string> frames;
    int answers = 0;
    char buffer[1024];
    while (answers < 2 && std::fgets(buffer, sizeof buffer, process.answers)) {
      std::string line(buffer);
      line = line.substr(0, line.find_first_of(" \n"));
      if (line.rfind("0x", 0) == 0) ++answers;
      else frames.push_back(line);
    }
    if (answers == 2 && std::fgets(buffer, sizeof buffer, process.answers)) known_lines[address] = join_frames(frames);
  }
}

std::string describe_coordinates(uint3 c) {
  return "(" + std::to_string(c.x) + "," + std::to_string(c.y) + "," + std::to_string(c.z) + ")";
}

std::string text_of(const Report& r) {
  std::string text = r.kind + ": " + r.message;
  if (!r.where.empty()) text += "\n    at " + r.where;
  if (!r.other.empty()) text += "\n    the other at " + r.other;
  text += "\n    block " + describe_coordinates(r.block) + " thread " + describe_coordinates(r.thread);
  if (r.count > 1) text += ", the first of " + std::to_string(r.count);
  return text;
}

}  // namespace

void report(const char* kind, const std::string& message, const void* address, const void* other) {
  const std::string name(kind);
  if (bounds.only && (name == "race" || name == "uninitialised read")) return;
  for (Pending& p : pending)
    if (p.report.kind == kind && p.address == address && p.other == other) {
      ++p.report.count;
      return;
    }
  const uint3 thread = current ? current->coordinates : uint3{0, 0, 0};
  pending.push_back({{kind, message, "", "", block_, thread, 1}, address, other});
}

std::vector<std::string> source_lines(const std::vector<const void*>& addresses) {
  std::map<std::pair<std::string, const char*>, std::vector<const void*>> unknown;
  for (const void* address : addresses) {
    Dl_info info;
    if (!address || known_lines.count(address) || !dladdr(address, &info)) continue;
    unknown[{info.dli_fname, static_cast<const char*>(info.dli_fbase)}].push_back(address);
  }
  for (const auto& [file, of_file] : unknown) look_up(file.first.c_str(), file.second, of_file);
  std::vector<std::string> lines;
  for (const void* address : addresses) lines.push_back(address ? known_lines[address] : "");
  return lines;
}

std::string source_line(Place place) {
  const std::string line = source_lines({place.address})[0];
  if (!line.empty() && line[0] != '?') return line;
  if (!place.file) return "an unknown place";
  const std::string path(place.file);
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(place.line);
}

void throw_reports() {
  if (pending.empty()) return;
  std::vector<const void*> addresses;
  for (const Pending& p : pending) addresses.insert(addresses.end(), {p.address, p.other});
  const std::vector<std::string> lines = source_lines(addresses);
  last.clear();
  std::string text = "in " + launch_.kernel + ":";
  for (size_t i = 0; i < pending.size(); ++i) {
    Report& r = pending[i].report;
    r.where = lines[2 * i];
    r.other = lines[2 * i + 1];
    last.push_back(r);
    if (i < kMostReports) text += "\n  " + text_of(r);
  }
  if (pending.size() > kMostReports) text += "\n  and " + std::to_string(pending.size() - kMostReports) + " more";
  pending.clear();
  throw Error(text);
}

std::vector<Report> last_reports() { return last; }

}  // namespace emu
