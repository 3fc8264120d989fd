#include "attributes.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "shape.h"

namespace dbsam::plugins {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

[[noreturn]] void refuse(const char* name, const std::string& found, const std::string& expected) {
  throw Refused(std::string("attribute ") + name + " " + found + ", expected " + expected);
}

// The field's data need not be aligned: in an engine it lies where the bytes before it end.
template <class T>
T read(const PluginField& field, int32_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(field.data) + index * sizeof(T), sizeof(T));
  return value;
}

std::string type_code(const PluginField& field) {
  return "is a field of type " + std::to_string(static_cast<int32_t>(field.type));
}

std::string known_names(const std::vector<AttributeSpec>& specs) {
  std::string names;
  for (const AttributeSpec& spec : specs) {
    names += (names.empty() ? "" : ", ") + std::string(spec.name);
  }
  return names;
}

bool is_known(const std::vector<AttributeSpec>& specs, const char* name) {
  for (const AttributeSpec& spec : specs) {
    if (std::strcmp(spec.name, name) == 0) {
      return true;
    }
  }
  return false;
}

// Shortest text that reads back as the same float.
std::string float_text(float value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", static_cast<double>(value));
  return text;
}

}  // namespace

Attributes::Attributes(const nvinfer1::PluginFieldCollection* fields,
                       const std::vector<AttributeSpec>& specs) {
  const int32_t count = fields == nullptr || fields->fields == nullptr ? 0 : fields->nbFields;
  for (int32_t index = 0; index < count; ++index) {
    const PluginField& field = fields->fields[index];
    if (field.name == nullptr) {
      throw Refused("an attribute without a name, expected " + known_names(specs));
    }
    if (!is_known(specs, field.name)) {
      refuse(field.name, "is unknown", known_names(specs));
    }
    for (const PluginField* other : fields_) {
      if (std::strcmp(other->name, field.name) == 0) {
        refuse(field.name, "is given twice", "it once");
      }
    }
    fields_.push_back(&field);
  }
}

const PluginField& Attributes::find(const char* name) const {
  for (const PluginField* field : fields_) {
    if (std::strcmp(field->name, name) == 0) {
      if (field->data == nullptr || field->length < 1) {
        refuse(name, "is empty", "a value");
      }
      return *field;
    }
  }
  throw Refused(std::string("attribute ") + name + " is missing");
}

std::vector<int32_t> Attributes::integers(const PluginField& field, int32_t low,
                                          int32_t high) const {
  const bool narrow = field.type == PluginFieldType::kINT32;
  if (!narrow && field.type != PluginFieldType::kINT64) {
    refuse(field.name, type_code(field), "integers (INT32 or INT64)");
  }
  std::vector<int32_t> values;
  for (int32_t index = 0; index < field.length; ++index) {
    const int64_t value = narrow ? read<int32_t>(field, index) : read<int64_t>(field, index);
    if (value < low || value > high) {
      refuse(field.name, "has the value " + std::to_string(value),
             std::to_string(low) + " to " + std::to_string(high));
    }
    values.push_back(static_cast<int32_t>(value));
  }
  return values;
}

int32_t Attributes::integer(const char* name, int32_t low, int32_t high) const {
  const PluginField& field = find(name);
  if (field.length != 1) {
    refuse(name, "has " + std::to_string(field.length) + " values", "one");
  }
  return integers(field, low, high).front();
}

float Attributes::real(const char* name, float low, float high) const {
  const PluginField& field = find(name);
  const bool narrow = field.type == PluginFieldType::kFLOAT32;
  if (!narrow && field.type != PluginFieldType::kFLOAT64) {
    refuse(name, type_code(field), "a number (FLOAT32 or FLOAT64)");
  }
  if (field.length != 1) {
    refuse(name, "has " + std::to_string(field.length) + " values", "one");
  }
  const double value = narrow ? read<float>(field, 0) : read<double>(field, 0);
  if (!(value >= low && value <= high)) {  // written so that NaN is refused
    refuse(name, "has the value " + std::to_string(value),
           float_text(low) + " to " + float_text(high));
  }
  return static_cast<float>(value);
}

std::vector<int32_t> Attributes::map_shapes(const char* name, int32_t most) const {
  const PluginField& field = find(name);
  if (field.length % 2 != 0 || field.length > 2 * most) {
    refuse(name, "has " + std::to_string(field.length) + " values",
           "height and width of 1 to " + std::to_string(most) + " maps");
  }
  std::vector<int32_t> shapes = integers(field, 1, 1 << 15);
  checked_size(name, count_cells(shapes));
  return shapes;
}

void FieldList::add(const AttributeSpec& spec, const void* data, int32_t count) {
  fields_.emplace_back(spec.name, data, spec.type, count);
}

const nvinfer1::PluginFieldCollection* FieldList::collection() {
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

std::string FieldList::text() const {
  std::string text;
  for (const PluginField& field : fields_) {
    text += (text.empty() ? "" : " ") + std::string(field.name) + "=";
    for (int32_t index = 0; index < field.length; ++index) {
      text += index == 0 ? "" : ",";
      text += field.type == PluginFieldType::kINT32 ? std::to_string(read<int32_t>(field, index))
                                                    : float_text(read<float>(field, index));
    }
  }
  return text;
}

int64_t count_cells(const std::vector<int32_t>& shapes) {
  int64_t cells = 0;
  for (size_t index = 0; index + 1 < shapes.size(); index += 2) {
    cells += static_cast<int64_t>(shapes[index]) * shapes[index + 1];
  }
  return cells;
}

}  // namespace dbsam::plugins
